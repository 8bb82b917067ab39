"""The dense Qwen3 decoder: the common one, with queries and keys normalised per head before rotation."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.common.block import Attention, Block
from models.common.config import DecoderConfig
from models.common.decoder import Decoder


class Qwen3Attention(Attention):
    """Attention whose query and key heads are RMS-normalised over ``head_dim``."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, **kinds)
        self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, **kinds)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Block(Block):
    """A layer with such attention."""

    attention_class = Qwen3Attention


class Qwen3(Decoder):
    """A dense Qwen3 decoder."""

    block_class = Qwen3Block
