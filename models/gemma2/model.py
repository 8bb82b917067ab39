"""The Gemma 2 decoder: norms on both sides, GeGLU, soft caps, and every other layer with a sliding window."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.common.attention import Scores, soft_cap
from models.common.block import Attention, SandwichBlock
from models.common.decoder import Decoder
from models.common.mlp import GeGLU
from models.common.norms import OffsetRMSNorm
from models.gemma2.config import Gemma2Config


class Gemma2Attention(Attention):
    """Attention with a scale of its own, and scores that are soft-capped."""

    def make_scores(self, config: Gemma2Config, layer: int) -> Scores:
        return Scores(scale=config.query_scalar**-0.5, window=config.window(layer), soft_cap=config.attention_cap)


class Gemma2Block(SandwichBlock):
    """A layer of such attention and GeGLU, each between two norms."""

    attention_class = Gemma2Attention
    mlp_class = GeGLU
    norm_class = OffsetRMSNorm


class Gemma2(Decoder):
    """A Gemma 2 decoder."""

    block_class = Gemma2Block

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # The factor is rounded to the model's type, as it was in training.
        return self.embed(tokens) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        return soft_cap(super().logits(x), self.config.final_cap)
