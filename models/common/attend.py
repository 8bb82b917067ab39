"""Attention without a cache: every query sees every key, but for those that a mask hides."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Softmax attention of all queries over all keys.

    Args:
      q: ``[B, T, H, D]``.
      k, v: ``[B, S, H, D]``.
      visible: boolean, broadcast to ``[B, H, T, S]``; None hides nothing. A query that sees no key averages all of them.

    Returns:
      ``[B, T, H, D]`` in the dtype of ``q``. Scores and softmax are float32.
    """
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v).astype(q.dtype)
