"""Pure functions for generation, written once for every model and ready for ``jax.jit`` or any wrapper of it.

A model is passed as ``graphdef, state = nnx.split(model)``: ``graphdef`` is static, ``state`` is a pytree of arrays, so
that weights are operands of the compiled function and not constants inside it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models.common.cache import Cache


def decode_step(
    graphdef: nnx.GraphDef, state: Any, token: jax.Array, cache: Cache, pos: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feed one ``token`` (int32 ``[B]``) at ``pos``; returns float32 logits ``[B, V]`` and the updated cache."""
    model = nnx.merge(graphdef, state)
    logits, cache = model(token[:, None], cache, pos)
    return logits[:, 0], cache


def greedy_step(
    graphdef: nnx.GraphDef, state: Any, token: jax.Array, cache: Cache, pos: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
    """``decode_step`` and the likeliest next token: (int32 ``[B]``, float32 logits ``[B, V]``, cache)."""
    logits, cache = decode_step(graphdef, state, token, cache, pos)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """One token per row, int32 ``[B]``, drawn from ``softmax(logits / temperature)``; ``temperature`` is positive."""
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


def sample_step(
    graphdef: nnx.GraphDef,
    state: Any,
    token: jax.Array,
    cache: Cache,
    pos: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, Cache]:
    """``decode_step`` and a sampled next token. The draw at a position depends on ``key`` and ``pos`` only."""
    logits, cache = decode_step(graphdef, state, token, cache, pos)
    return sample(logits, jax.random.fold_in(key, pos), temperature), logits, cache


def prefill(
    graphdef: nnx.GraphDef, state: Any, tokens: jax.Array, cache: Cache, pos: jax.Array, last: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feed a block of prompt tokens and return the logits that follow one of them.

    A prompt may be fed in blocks of one size, the last one padded: what padding writes to the cache lies after the
    prompt, where decoding overwrites it before anything attends to it. Logits are computed for one position only,
    since those of a whole block can be larger than the model.

    Args:
      tokens: int32 ``[B, T]``.
      pos: int32 scalar, position of ``tokens[:, 0]``; ``pos + T`` must not exceed the cache.
      last: int32 scalar, index within the block of the last real token.

    Returns:
      float32 logits ``[B, V]`` after ``tokens[:, last]``, and the updated cache.
    """
    model = nnx.merge(graphdef, state)
    hidden, cache = model.hidden(tokens, cache, pos)
    hidden = lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)
    return model.logits(hidden), cache
