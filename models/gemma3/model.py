"""The Gemma 3 decoder: Gemma 2 with queries and keys normalised per head, and two rope bases."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.common.norms import OffsetRMSNorm
from models.common.rope import Rotation, frequencies, rope_table
from models.gemma2.model import Gemma2, Gemma2Attention, Gemma2Block
from models.gemma3.config import Gemma3Config


class Gemma3Attention(Gemma2Attention):
    """Attention whose query and key heads are RMS-normalised over ``head_dim``."""

    def __init__(self, config: Gemma3Config, layer: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, layer, **kinds)
        self.q_norm = OffsetRMSNorm(config.head_dim, epsilon=config.norm_eps, **kinds)
        self.k_norm = OffsetRMSNorm(config.head_dim, epsilon=config.norm_eps, **kinds)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Gemma3Block(Gemma2Block):
    """A layer with such attention."""

    attention_class = Gemma3Attention


class Gemma3(Gemma2):
    """A Gemma 3 decoder."""

    block_class = Gemma3Block

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        config = self.config
        everywhere = rope_table(frequencies(config), positions)
        local = config.replace(rope_theta=config.local_theta, rope_scaling=None)
        nearby = rope_table(frequencies(local), positions)
        return [everywhere if config.is_global(layer) else nearby for layer in range(config.num_layers)]
