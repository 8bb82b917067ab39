"""Rotary position embedding, in the half-split layout that Llama and Qwen checkpoints use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from models.common.rotary import Llama3RopeScaling, RotaryConfig

Rotation = tuple[jax.Array, jax.Array]
"""Cosines and sines, float32 ``[T, head_dim / 2]`` each, of the angles at ``T`` positions."""


def frequencies(config: RotaryConfig) -> np.ndarray:
    """Angular frequency of each rotated pair: float32 ``[head_dim / 2]``, fastest first.

    Computed on the host in float64, because at position 100,000 a relative error of 1e-7 is already 0.01 radian.
    """
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if config.rope_scaling is not None:
        freqs = _stretch(freqs, config.rope_scaling)
    return freqs.astype(np.float32)


def _stretch(freqs: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    turns = freqs * scaling.original_max_len / (2 * np.pi)  # rotations within the pretraining context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * freqs + (1.0 - keep) * freqs / scaling.factor


def rope_table(freqs: np.ndarray, positions: jax.Array) -> Rotation:
    """The rotation at ``positions``: int32 ``[T]``."""
    angles = positions[:, None].astype(jnp.float32) * freqs
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the heads of ``x``: ``[B, T, H, head_dim]``; computed in float32, returned in the dtype of ``x``."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
