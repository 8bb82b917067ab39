"""The vision transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from models.common.attend import attend
from models.vit.config import ViTConfig


class Block(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream.

    Attributes:
      kinds: dtype and param_dtype.
    """

    config: ViTConfig
    kinds: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, kinds = self.config, self.kinds
        norm = partial(nn.LayerNorm, epsilon=config.norm_eps, use_fast_variance=False, **kinds)
        y = norm(name="attention_norm")(x)
        heads = (*x.shape[:2], config.num_heads, -1)
        q, k, v = (
            nn.Dense(config.hidden_size, use_bias=config.qkv_bias, name=name, **kinds)(y).reshape(heads)
            for name in "qkv"
        )
        x = x + nn.Dense(config.hidden_size, name="o", **kinds)(attend(q, k, v).reshape(x.shape))
        y = norm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(config.intermediate_size, name="up", **kinds)(y), approximate=False)
        return x + nn.Dense(config.hidden_size, name="down", **kinds)(y)


class ViT(nn.Module):
    """A vision transformer with a classifier.

    Attributes:
      config: its shape.
      dtype: of parameters and activations.
    """

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.dtype)
        patch = (config.patch_size, config.patch_size)
        self.patches = nn.Conv(config.hidden_size, patch, strides=patch, padding="VALID", **kinds)
        small = nn.initializers.normal(0.02)
        self.token = self.param("token", small, (1, 1, config.hidden_size), self.dtype)
        self.positions = self.param("positions", small, (1, config.num_patches + 1, config.hidden_size), self.dtype)
        self.layers = [Block(config, kinds) for _ in range(config.num_layers)]
        self.norm = nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, **kinds)
        self.head = nn.Dense(config.num_labels, dtype=jnp.float32, param_dtype=self.dtype)

    def hidden(self, pixels: jax.Array) -> jax.Array:
        """The last layer's output before its norm, ``[B, 1 + num_patches, hidden_size]``, the class token first."""
        x = self.patches(pixels.astype(self.dtype))
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        x = jnp.concatenate([jnp.broadcast_to(self.token, (batch, 1, width)), x], axis=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return x

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Classify images.

        Args:
          pixels: ``[B, image_size, image_size, num_channels]``, normalised as the model was trained.

        Returns:
          Logits, float32 ``[B, num_labels]``.
        """
        return self.head(self.norm(self.hidden(pixels)[:, 0]))
