"""The decoder that both families build on; a family contributes its attention module."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common.attention import cached_attention
from models.common.cache import Cache, LayerCache, init_cache, update_cache
from models.common.config import DecoderConfig
from models.common.rope import apply_rope, frequencies, rope_table


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions and a key/value cache."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.head_dim = config.head_dim
        self.q = linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o = linear(config.num_heads * config.head_dim, config.hidden_size)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each ``[B, T, heads, head_dim]``, before rotation."""
        heads = (*x.shape[:2], -1, self.head_dim)
        return self.q(x).reshape(heads), self.k(x).reshape(heads), self.v(x).reshape(heads)

    def __call__(
        self, x: jax.Array, cache: LayerCache, pos: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        q, k, v = self.project(x)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        cache = update_cache(cache, k, v, pos)
        out = cached_attention(q, cache["k"], cache["v"], pos)
        return self.o(out.reshape(*x.shape[:2], -1)), cache


class SwiGLU(nnx.Module):
    """The gated feed-forward block: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream."""

    def __init__(self, attention: nnx.Module, config: DecoderConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, **kinds)
        self.attention = attention
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, **kinds)
        self.mlp = SwiGLU(config, **kinds)

    def __call__(
        self, x: jax.Array, cache: LayerCache, pos: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        attended, cache = self.attention(self.attention_norm(x), cache, pos, cos, sin)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
      config: its shape.
      dtype: of activations and cache.
      param_dtype: of parameters; ``dtype`` unless given.
      rngs: for the initial weights (``models.common.initialize.random_model`` is much faster for large ones).
    """

    attention_class: type[Attention] = Attention

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        kinds = dict(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **kinds)
        self.layers = nnx.List(
            [Block(self.attention_class(config, **kinds), config, **kinds) for _ in range(config.num_layers)]
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, **kinds)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                preferred_element_type=jnp.float32,
                **kinds,
            )

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """An empty cache in the model's dtype; see ``models.common.cache.init_cache``."""
        return init_cache(self.config, batch, max_len, self.dtype)

    def hidden(self, tokens: jax.Array, cache: Cache, pos: jax.Array) -> tuple[jax.Array, Cache]:
        """Final hidden states ``[B, T, hidden_size]`` in the model's dtype, and the updated cache."""
        positions = pos + jnp.arange(tokens.shape[1])
        cos, sin = rope_table(frequencies(self.config), positions)
        x = self.embed(tokens)
        updated = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer(x, layer_cache, pos, cos, sin)
            updated.append(layer_cache)
        return self.norm(x), updated

    def logits(self, x: jax.Array) -> jax.Array:
        """Next-token logits, float32 ``[..., vocab_size]``, of hidden states ``[..., hidden_size]``."""
        if not self.config.tie_embeddings:
            return self.head(x)
        embedding = self.embed.embedding[...].astype(self.dtype)
        return jnp.einsum("...d,vd->...v", x, embedding, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array, cache: Cache, pos: jax.Array) -> tuple[jax.Array, Cache]:
        """Run ``tokens`` at consecutive positions after what the cache already holds.

        Args:
          tokens: int32 ``[B, T]``.
          cache: list over layers of ``dict(k=[B, S, Hkv, D], v=[B, S, Hkv, D])``; ``pos + T <= S``.
          pos: int32 scalar, the position of ``tokens[:, 0]``.

        Returns:
          Logits, float32 ``[B, T, vocab_size]``, and the updated cache.
        """
        x, cache = self.hidden(tokens, cache, pos)
        return self.logits(x), cache
