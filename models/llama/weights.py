"""Hugging Face checkpoints of Llama 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.common import checkpoint
from models.common.names import decoder_tensors, ignored_tensors
from models.llama.config import LlamaConfig
from models.llama.model import Llama


def tensor_map(config: LlamaConfig) -> checkpoint.TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    return decoder_tensors(config)


def from_pretrained(
    directory: Path | str,
    *,
    config: LlamaConfig | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    progress: Callable[[int, int], None] | None = None,
) -> Llama:
    """Load a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
      ConfigError: ``config.json`` describes something that is not supported.
    """
    if config is None:
        config = checkpoint.load_config(LlamaConfig, directory)
    return checkpoint.load_model(
        Llama,
        config,
        directory,
        tensor_map(config),
        dtype=dtype,
        ignore=ignored_tensors(config),
        progress=progress,
    )


def save_pretrained(
    model: Llama, directory: Path | str, *, dtype: DTypeLike | None = None, max_file_bytes: int = 5 << 30
) -> None:
    """Write ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    config = model.config
    checkpoint.save_model(
        model, directory, tensor_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes
    )
