"""Norms that Flax does not have. They are made as those of Flax are, so that a block can take either."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


class OffsetRMSNorm(nnx.Module):
    """RMS normalisation over the last axis whose scale is ``1 + offset``: float32 inside, returned in ``dtype``.

    The sum is of float32 too, whatever the type of the parameter: near 1 a bfloat16 would lose most of the offset.
    """

    def __init__(self, num_features: int, *, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.offset = nnx.Param(nnx.initializers.zeros(rngs.params(), (num_features,), param_dtype))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * (1.0 + self.offset[...].astype(jnp.float32))).astype(self.dtype)
