"""Hugging Face checkpoints of ViT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.common import checkpoint, linen
from models.common.linen import LINEAR, Stored
from models.vit.config import ViTConfig
from models.vit.model import ViT

_CONV = (2, 3, 1, 0)  # stored as [out, in, height, width], kept as [height, width, in, out]
_LINEAR = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}


def stored_map(config: ViTConfig) -> linen.StoredMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    stored = {
        ("token",): Stored("vit.embeddings.cls_token"),
        ("positions",): Stored("vit.embeddings.position_embeddings"),
        ("patches", "kernel"): Stored("vit.embeddings.patch_embeddings.projection.weight", _CONV),
        ("patches", "bias"): Stored("vit.embeddings.patch_embeddings.projection.bias"),
        ("norm", "scale"): Stored("vit.layernorm.weight"),
        ("norm", "bias"): Stored("vit.layernorm.bias"),
        ("head", "kernel"): Stored("classifier.weight", LINEAR),
        ("head", "bias"): Stored("classifier.bias"),
    }
    for index in range(config.num_layers):
        path, prefix = f"layers_{index}", f"vit.encoder.layer.{index}."
        for ours, name in _LINEAR.items():
            stored[path, ours, "kernel"] = Stored(f"{prefix}{name}.weight", LINEAR)
            if config.qkv_bias or ours not in "qkv":
                stored[path, ours, "bias"] = Stored(f"{prefix}{name}.bias")
        for ours, name in _NORMS.items():
            stored[path, ours, "scale"] = Stored(f"{prefix}{name}.weight")
            stored[path, ours, "bias"] = Stored(f"{prefix}{name}.bias")
    return stored


def _pixels(config: ViTConfig) -> jax.ShapeDtypeStruct:
    """An image that a model can be described with."""
    return jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.num_channels), jnp.float32)


def random_model(config: ViTConfig, *, dtype: DTypeLike = jnp.float32, seed: int = 0) -> tuple[ViT, linen.Params]:
    """A model and random parameters for it."""
    model = ViT(config, dtype)
    return model, linen.random_params(model, _pixels(config), seed=seed)


def from_pretrained(
    directory: Path | str,
    *,
    config: ViTConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ViT, linen.Params]:
    """A model and its parameters from a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
      ConfigError: ``config.json`` describes something that is not supported.
    """
    if config is None:
        config = checkpoint.load_config(ViTConfig, directory)
    model = ViT(config, dtype)
    return model, linen.load_params(
        model,
        _pixels(config),
        directory=directory,
        stored=stored_map(config),
        dtype=dtype,
        progress=progress,
    )


def save_pretrained(
    model: ViT,
    params: linen.Params,
    directory: Path | str,
    *,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write ``params`` of ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    config = model.config
    linen.save_params(params, directory, stored_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes)
