"""The decoder that all families build on; a family contributes its blocks, and what it does before and after them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common.block import Block
from models.common.cache import Cache, init_cache
from models.common.config import DecoderConfig
from models.common.rope import Rotation, frequencies, rope_table


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
      config: its shape.
      dtype: of activations and cache.
      param_dtype: of parameters; ``dtype`` unless given.
      rngs: for the initial weights (``models.common.initialize.random_model`` is much faster for large ones).

    Attributes:
      block_class: the layers; the norm after them is of their kind.
    """

    block_class: type[Block] = Block

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
        self.layers = nnx.List([self.block_class(config, layer, **kinds) for layer in range(config.num_layers)])
        self.norm = self.block_class.norm_class(config.hidden_size, epsilon=config.norm_eps, **kinds)
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

    def rotations(self, positions: jax.Array) -> Sequence[Rotation | None]:
        """What each layer turns its queries and keys by at ``positions`` (int32 ``[T]``); None leaves them as they are."""
        return [rope_table(frequencies(self.config), positions)] * self.config.num_layers

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer gets: ``[B, T, hidden_size]`` in the model's dtype."""
        return self.embed(tokens)

    def hidden(self, tokens: jax.Array, cache: Cache, pos: jax.Array) -> tuple[jax.Array, Cache]:
        """Final hidden states ``[B, T, hidden_size]`` in the model's dtype, and the updated cache."""
        positions = pos + jnp.arange(tokens.shape[1])
        rotations = self.rotations(positions)
        x = self.embedded(tokens, positions)
        updated = []
        for layer, layer_cache, rotation in zip(self.layers, cache, rotations, strict=True):
            x, layer_cache = layer(x, layer_cache, pos, rotation)
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
