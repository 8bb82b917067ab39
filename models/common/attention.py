"""Grouped-query attention over a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array) -> jax.Array:
    """Causal attention of queries at positions ``pos`` to ``pos + T - 1`` over all cached keys up to their own.

    Args:
      q: ``[B, T, H, D]``, rotated.
      k, v: ``[B, S, Hkv, D]``, already holding the keys and values of these queries; ``H`` is a multiple of ``Hkv``.
      pos: int32 scalar.

    Returns:
      ``[B, T, H, D]`` in the dtype of ``q``. Scores and softmax are float32.
    """
    batch, length, heads, dim = q.shape
    slots, kv_heads = k.shape[1:3]
    # Query heads that share a key head become one axis of the contraction, so keys are never repeated.
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    visible = jnp.arange(slots)[None, :] <= pos + jnp.arange(length)[:, None]
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(batch, length, heads, dim).astype(q.dtype)
