"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.common.config import DecoderConfig


class GatedMLP(nnx.Module):
    """The gated feed-forward block: ``down(activation(gate(x)) * up(x))``. A subclass says which activation."""

    activation: Callable[[jax.Array], jax.Array]

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class SwiGLU(GatedMLP):
    """Gated by ``silu``."""

    activation = staticmethod(nnx.silu)


class GeGLU(GatedMLP):
    """Gated by ``gelu``, the one made of ``tanh``."""

    activation = staticmethod(partial(nnx.gelu, approximate=True))


class GeluMLP(nnx.Module):
    """The plain feed-forward block, with biases: ``down(gelu(up(x)))``, where ``gelu`` is the one made of ``tanh``."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x), approximate=True))
