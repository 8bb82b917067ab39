"""A layer of a decoder, and the attention in it: what families put together in their own ways."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.common.attention import Scores, cached_attention
from models.common.cache import LayerCache, update_cache
from models.common.config import DecoderConfig
from models.common.mlp import SwiGLU
from models.common.rope import Rotation, apply_rope


class Attention(nnx.Module):
    """Grouped-query self-attention with a key/value cache, and with rotary positions if it is given a rotation.

    Args:
      layer: index of the layer, since those of one model may differ.

    Attributes:
      use_bias: whether queries, keys and values have biases.
    """

    use_bias = False

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.head_dim = config.head_dim
        self.scores = self.make_scores(config, layer)
        self.q = linear(config.hidden_size, config.num_heads * config.head_dim, use_bias=self.use_bias)
        self.k = linear(config.hidden_size, config.num_kv_heads * config.head_dim, use_bias=self.use_bias)
        self.v = linear(config.hidden_size, config.num_kv_heads * config.head_dim, use_bias=self.use_bias)
        self.o = linear(config.num_heads * config.head_dim, config.hidden_size, use_bias=False)

    def make_scores(self, config: DecoderConfig, layer: int) -> Scores:
        """How this layer makes its scores."""
        return Scores(scale=config.head_dim**-0.5, window=config.window(layer))

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each ``[B, T, heads, head_dim]``, before rotation."""
        heads = (*x.shape[:2], -1, self.head_dim)
        return self.q(x).reshape(heads), self.k(x).reshape(heads), self.v(x).reshape(heads)

    def __call__(
        self, x: jax.Array, cache: LayerCache, pos: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, LayerCache]:
        q, k, v = self.project(x)
        if rotation is not None:
            q, k = apply_rope(q, *rotation), apply_rope(k, *rotation)
        cache = update_cache(cache, k, v, pos)
        out = cached_attention(q, cache["k"], cache["v"], pos, self.scores)
        return self.o(out.reshape(*x.shape[:2], -1)), cache


class Block(nnx.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream.

    Attributes:
      attention_class, mlp_class, norm_class: what it is made of. A norm is made as those of Flax are.
    """

    attention_class: type[Attention] = Attention
    mlp_class: type[nnx.Module] = SwiGLU
    norm_class: type[nnx.Module] = nnx.RMSNorm

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention_norm = self.norm_class(config.hidden_size, epsilon=config.norm_eps, **kinds)
        self.attention = self.attention_class(config, layer, **kinds)
        self.mlp_norm = self.norm_class(config.hidden_size, epsilon=config.norm_eps, **kinds)
        self.mlp = self.mlp_class(config, **kinds)

    def __call__(
        self, x: jax.Array, cache: LayerCache, pos: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, LayerCache]:
        attended, cache = self.attention(self.attention_norm(x), cache, pos, rotation)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class SandwichBlock(Block):
    """A layer that also normalises what attention and feed-forward give, before that is added."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, layer, **kinds)
        self.attention_post_norm = self.norm_class(config.hidden_size, epsilon=config.norm_eps, **kinds)
        self.mlp_post_norm = self.norm_class(config.hidden_size, epsilon=config.norm_eps, **kinds)

    def __call__(
        self, x: jax.Array, cache: LayerCache, pos: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, LayerCache]:
        attended, cache = self.attention(self.attention_norm(x), cache, pos, rotation)
        x = x + self.attention_post_norm(attended)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), cache
