"""Hugging Face checkpoints of BERT, bare or inside of a model with a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.bert.config import BertConfig
from models.bert.model import Bert
from models.common import checkpoint
from models.common.checkpoint import Tensor

_LINEAR = {
    ("attention", "q"): "attention.self.query",
    ("attention", "k"): "attention.self.key",
    ("attention", "v"): "attention.self.value",
    ("attention", "o"): "attention.output.dense",
    ("up",): "intermediate.dense",
    ("down",): "output.dense",
}
_NORMS = {("attention_norm",): "attention.output.LayerNorm", ("mlp_norm",): "output.LayerNorm"}
_PREFIX = "bert."  # of the encoder's tensors inside of a model with a head
_HEADS = ("cls.", "classifier.", "qa_outputs.")  # of which nothing here makes use


def tensor_map(config: BertConfig, names: Iterable[str] = ()) -> checkpoint.TensorMap:
    """Each parameter of the model to its tensor in a checkpoint.

    Args:
      names: of the tensors that the checkpoint has: whether they have a prefix, and how old the names of norms are.
    """
    names = set(names)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in names) else ""
    old = f"{prefix}embeddings.LayerNorm.gamma" in names
    scale, shift = ("gamma", "beta") if old else ("weight", "bias")

    def linear(path: tuple, name: str) -> dict[tuple, Tensor]:
        # Checkpoints store linear layers as [out, in]; nnx.Linear keeps [in, out].
        kernel = Tensor(f"{prefix}{name}.weight", transpose=True)
        return {(*path, "kernel"): kernel, (*path, "bias"): Tensor(f"{prefix}{name}.bias")}

    def norm(path: tuple, name: str) -> dict[tuple, Tensor]:
        return {(*path, "scale"): Tensor(f"{prefix}{name}.{scale}"), (*path, "bias"): Tensor(f"{prefix}{name}.{shift}")}

    tensors = {
        ("words", "embedding"): Tensor(f"{prefix}embeddings.word_embeddings.weight"),
        ("positions", "embedding"): Tensor(f"{prefix}embeddings.position_embeddings.weight"),
        ("types", "embedding"): Tensor(f"{prefix}embeddings.token_type_embeddings.weight"),
        **norm(("norm",), "embeddings.LayerNorm"),
        **linear(("pooler",), "pooler.dense"),
    }
    for index in range(config.num_layers):
        layer = f"encoder.layer.{index}."
        for path, name in _LINEAR.items():
            tensors |= linear(("layers", index, *path), layer + name)
        for path, name in _NORMS.items():
            tensors |= norm(("layers", index, *path), layer + name)
    return tensors


def from_pretrained(
    directory: Path | str,
    *,
    config: BertConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Bert:
    """Load a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
      ConfigError: ``config.json`` describes something that is not supported.
    """
    if config is None:
        config = checkpoint.load_config(BertConfig, directory)
    names = checkpoint.tensor_names(directory)
    ignore = {name for name in names if name.startswith(_HEADS) or name.endswith("embeddings.position_ids")}
    tensors = tensor_map(config, names)
    return checkpoint.load_model(Bert, config, directory, tensors, dtype=dtype, ignore=ignore, progress=progress)


def save_pretrained(
    model: Bert, directory: Path | str, *, dtype: DTypeLike | None = None, max_file_bytes: int = 5 << 30
) -> None:
    """Write ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    config = model.config
    checkpoint.save_model(
        model, directory, tensor_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes
    )
