"""The GPT-2 decoder: learned positions, LayerNorm, biases everywhere, and queries, keys and values of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common.block import Attention, Block
from models.common.decoder import Decoder
from models.common.mlp import GeluMLP
from models.gpt2.config import GPT2Config


class GPT2Attention(Attention):
    """Attention without rotation. One matrix makes queries, keys and values, in this order, as its checkpoints have it."""

    def __init__(self, config: GPT2Config, layer: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.head_dim = config.head_dim
        self.scores = self.make_scores(config, layer)
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size)
        self.o = linear(config.hidden_size, config.hidden_size)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, -1, self.head_dim)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


class GPT2Block(Block):
    """A layer of such attention and a plain feed-forward block, both after a LayerNorm."""

    attention_class = GPT2Attention
    mlp_class = GeluMLP
    norm_class = nnx.LayerNorm


class GPT2(Decoder):
    """A GPT-2 decoder."""

    block_class = GPT2Block

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kinds = dict(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        self.positions = nnx.Embed(config.max_len, config.hidden_size, **kinds)

    def rotations(self, positions: jax.Array) -> Sequence[None]:
        return [None] * self.config.num_layers

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # A padded block may reach beyond the last position. What it writes there is never attended to, but must not be
        # the NaN that an embedding gives for an index out of range: times a weight of zero that is NaN too.
        return self.embed(tokens) + self.positions(jnp.minimum(positions, self.config.max_len - 1))
