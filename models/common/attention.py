"""Grouped-query attention over a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scores:
    """How attention scores are made of products of queries and keys.

    Attributes:
      scale: what the products are multiplied by.
      window: how many positions a query sees, itself and those just before it; None sees all before it.
      soft_cap: scores are squeezed between plus and minus this; see ``soft_cap``.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap * tanh(x / cap)``: about ``x`` where that is small, and never beyond ``cap``. None changes nothing."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, how: Scores) -> jax.Array:
    """Causal attention of queries at positions ``pos`` to ``pos + T - 1`` over the cached keys up to their own.

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
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * how.scale
    scores = soft_cap(scores, how.soft_cap)
    slot, own = jnp.arange(slots)[None, :], pos + jnp.arange(length)[:, None]
    visible = slot <= own
    if how.window is not None:
        visible &= slot > own - how.window
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(batch, length, heads, dim).astype(q.dtype)
