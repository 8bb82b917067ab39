"""The BERT encoder."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.bert.config import BertConfig
from models.common.attend import attend


class Attention(nnx.Module):
    """Self-attention in both directions."""

    def __init__(self, config: BertConfig, **kinds):
        linear = partial(nnx.Linear, config.hidden_size, config.hidden_size, **kinds)
        self.head_dim = config.head_dim
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, visible).reshape(x.shape))


class Block(nnx.Module):
    """One layer; what attention and feed-forward add to the residual stream is normalised after it is added."""

    def __init__(self, config: BertConfig, **kinds):
        # The variance as a mean of squares of differences, as published: the other way loses bits of large activations.
        norm = partial(nnx.LayerNorm, config.hidden_size, epsilon=config.norm_eps, use_fast_variance=False, **kinds)
        self.attention = Attention(config, **kinds)
        self.attention_norm = norm()
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, **kinds)
        self.mlp_norm = norm()

    def __call__(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, visible))
        return self.mlp_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """A BERT encoder with its pooler.

    Args:
      config: its shape.
      dtype: of activations.
      param_dtype: of parameters; ``dtype`` unless given.
      rngs: for the initial weights (``models.common.initialize.random_model`` is much faster for large ones).
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        kinds = dict(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.words = nnx.Embed(config.vocab_size, config.hidden_size, **kinds)
        self.positions = nnx.Embed(config.max_len, config.hidden_size, **kinds)
        self.types = nnx.Embed(config.num_types, config.hidden_size, **kinds)
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.norm_eps, use_fast_variance=False, **kinds)
        self.layers = nnx.List([Block(config, **kinds) for _ in range(config.num_layers)])
        self.pooler = nnx.Linear(config.hidden_size, config.hidden_size, **kinds)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None) -> jax.Array:
        """Encode whole sequences.

        Args:
          tokens: int32 ``[B, T]`` with ``T <= max_len``.
          mask: boolean or integer ``[B, T]``; where it is zero there is padding, which nothing attends to. None: no padding.
          types: int32 ``[B, T]``, the segment of each token; None: all are 0.

        Returns:
          ``[B, T, hidden_size]`` in the model's dtype; what it says of padding means nothing.
        """
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.types(types)
        x = self.norm(x)
        visible = None if mask is None else mask.astype(bool)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, visible)
        return x

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """What BERT was pretrained to summarise a sequence by: ``[B, hidden_size]``, from the first of ``hidden``."""
        return jnp.tanh(self.pooler(hidden[:, 0]))
