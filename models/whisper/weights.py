"""Hugging Face checkpoints of Whisper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common import checkpoint
from models.common.checkpoint import Tensor
from models.common.initialize import abstract_model
from models.common.tensors import load_tensors
from models.whisper.config import WhisperConfig
from models.whisper.model import Whisper

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_MLP_NORM = ("mlp", "norm")
_ENCODER = {("norm",): "self_attn_layer_norm", _MLP_NORM: "final_layer_norm"}
_DECODER = _ENCODER | {("cross_norm",): "encoder_attn_layer_norm"}
_HEAD = "proj_out.weight"  # the embedding once more


def tensor_map(config: WhisperConfig) -> checkpoint.TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    tensors: dict[tuple, Tensor] = {}

    def add(path: tuple, name: str, kernel: bool, bias: bool = True) -> None:
        # Reversed, [out, in] is the [in, out] of nnx.Linear, and [out, in, width] the [width, in, out] of nnx.Conv.
        tensors[*path, "kernel" if kernel else "scale"] = Tensor(f"{name}.weight", transpose=kernel)
        if bias:
            tensors[*path, "bias"] = Tensor(f"{name}.bias")

    for side, norms, layers in (
        ("encoder", _ENCODER, config.encoder_layers),
        ("decoder", _DECODER, config.decoder_layers),
    ):
        tensors[side, "positions", "embedding"] = Tensor(f"model.{side}.embed_positions.weight")
        add((side, "norm"), f"model.{side}.layer_norm", kernel=False)
        attentions = {"attention": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
        for index in range(layers):
            path, name = (side, "layers", index), f"model.{side}.layers.{index}."
            for ours, theirs in norms.items():
                add((*path, *ours), name + theirs, kernel=False)
            for ours, theirs in attentions.items():
                for letter, projection in _PROJECTIONS.items():
                    add((*path, ours, letter), f"{name}{theirs}.{projection}", kernel=True, bias=letter != "k")
            add((*path, "mlp", "up"), f"{name}fc1", kernel=True)
            add((*path, "mlp", "down"), f"{name}fc2", kernel=True)
    for conv in ("conv1", "conv2"):
        add(("encoder", conv), f"model.encoder.{conv}", kernel=True)
    tensors["decoder", "words", "embedding"] = Tensor("model.decoder.embed_tokens.weight")
    return tensors


def from_pretrained(
    directory: Path | str,
    *,
    config: WhisperConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Whisper:
    """Load a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
      ConfigError: ``config.json`` describes something that is not supported.
    """
    if config is None:
        config = checkpoint.load_config(WhisperConfig, directory)
    names = tensor_map(config)
    graphdef, state = nnx.split(abstract_model(Whisper, config, dtype))
    leaves = dict(nnx.to_flat_state(state))
    shapes = {
        names[path].name: leaf.shape[::-1] if names[path].transpose else leaf.shape for path, leaf in leaves.items()
    }
    tensors = load_tensors(shapes, directory, dtype=dtype, ignore=[_HEAD], progress=progress)
    filled = []
    for path, leaf in leaves.items():
        value = tensors.pop(names[path].name)
        filled.append((path, leaf.replace(value.T if names[path].transpose else value)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def save_pretrained(
    model: Whisper, directory: Path | str, *, dtype: DTypeLike | None = None, max_file_bytes: int = 5 << 30
) -> None:
    """Write ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    config = model.config
    checkpoint.save_model(
        model, directory, tensor_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes
    )
