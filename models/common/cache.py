"""The key/value cache: plain arrays in a list over layers, updated functionally."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from models.common.config import DecoderConfig

LayerCache = dict[str, jax.Array]
Cache = list[LayerCache]


def init_cache(config: DecoderConfig, batch: int, max_len: int, dtype: DTypeLike = jnp.bfloat16) -> Cache:
    """An empty cache: for each layer ``k`` and ``v``, zeros of ``[batch, max_len, num_kv_heads, head_dim]``."""
    shape = (batch, max_len, config.num_kv_heads, config.head_dim)
    return [dict(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


def update_cache(cache: LayerCache, k: jax.Array, v: jax.Array, pos: jax.Array) -> LayerCache:
    """Write ``k`` and ``v`` (``[B, T, num_kv_heads, head_dim]``) at positions ``pos`` to ``pos + T - 1``.

    The caller keeps ``pos + T <= max_len``: ``dynamic_update_slice`` would silently move a block that sticks out.
    """
    start = (0, pos, 0, 0)
    return dict(
        k=lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start),
        v=lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start),
    )
