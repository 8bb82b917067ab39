"""Hugging Face checkpoints of Qwen3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.common import checkpoint
from models.common.names import decoder_tensors, ignored_tensors
from models.qwen3.config import Qwen3Config
from models.qwen3.model import Qwen3

_HEAD_NORMS = {
    ("attention", "q_norm", "scale"): checkpoint.Tensor("self_attn.q_norm.weight"),
    ("attention", "k_norm", "scale"): checkpoint.Tensor("self_attn.k_norm.weight"),
}


def tensor_map(config: Qwen3Config) -> checkpoint.TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    return decoder_tensors(config, _HEAD_NORMS)


def from_pretrained(
    directory: Path | str,
    *,
    config: Qwen3Config | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    progress: Callable[[int, int], None] | None = None,
) -> Qwen3:
    """Load a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
      ConfigError: ``config.json`` describes something that is not supported.
    """
    if config is None:
        config = checkpoint.load_config(Qwen3Config, directory)
    return checkpoint.load_model(
        Qwen3,
        config,
        directory,
        tensor_map(config),
        dtype=dtype,
        ignore=ignored_tensors(config),
        progress=progress,
    )


def save_pretrained(
    model: Qwen3, directory: Path | str, *, dtype: DTypeLike | None = None, max_file_bytes: int = 5 << 30
) -> None:
    """Write ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    config = model.config
    checkpoint.save_model(
        model, directory, tensor_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes
    )
