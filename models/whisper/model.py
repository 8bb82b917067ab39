"""Whisper: an encoder of sound, and a decoder of text with attention to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common.attend import attend
from models.common.attention import Scores, cached_attention
from models.common.cache import LayerCache, update_cache
from models.whisper.config import WhisperConfig

Cache = list[dict[str, LayerCache]]


class Attention(nnx.Module):
    """The projections of an attention; keys have no bias, which would change no weight."""

    def __init__(self, width: int, heads: int, **kinds: Any):
        linear = partial(nnx.Linear, width, width, **kinds)
        self.heads = heads
        self.q, self.k, self.v, self.o = linear(), linear(use_bias=False), linear(), linear()

    def queries(self, x: jax.Array) -> jax.Array:
        """``[B, T, H, D]``."""
        return self.q(x).reshape(*x.shape[:2], self.heads, -1)

    def keys(self, x: jax.Array) -> LayerCache:
        """Keys ``k`` and values ``v``, ``[B, S, H, D]`` each."""
        heads = (*x.shape[:2], self.heads, -1)
        return dict(k=self.k(x).reshape(heads), v=self.v(x).reshape(heads))

    def join(self, x: jax.Array) -> jax.Array:
        """What the heads found, ``[B, T, H, D]``, as ``[B, T, width]``."""
        return self.o(x.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """A norm, and two layers with an erf GELU between them."""

    def __init__(self, width: int, intermediate: int, **kinds: Any):
        self.norm = layer_norm(width, **kinds)
        self.up = nnx.Linear(width, intermediate, **kinds)
        self.down = nnx.Linear(intermediate, width, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(self.norm(x)), approximate=False))


def layer_norm(width: int, **kinds: Any) -> nnx.LayerNorm:
    """The norm before every block, and after the last."""
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, **kinds)


class EncoderBlock(nnx.Module):
    """Attention in both directions and feed-forward, each added to the residual stream."""

    def __init__(self, config: WhisperConfig, **kinds: Any):
        self.norm = layer_norm(config.hidden_size, **kinds)
        self.attention = Attention(config.hidden_size, config.encoder_heads, **kinds)
        self.mlp = FeedForward(config.hidden_size, config.encoder_intermediate_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        x = x + self.attention.join(attend(self.attention.queries(y), **self.attention.keys(y)))
        return x + self.mlp(x)


class DecoderBlock(nnx.Module):
    """Causal attention, attention to the sound, and feed-forward, each added to the residual stream."""

    def __init__(self, config: WhisperConfig, **kinds: Any):
        self.norm = layer_norm(config.hidden_size, **kinds)
        self.attention = Attention(config.hidden_size, config.decoder_heads, **kinds)
        self.cross_norm = layer_norm(config.hidden_size, **kinds)
        self.cross = Attention(config.hidden_size, config.decoder_heads, **kinds)
        self.mlp = FeedForward(config.hidden_size, config.decoder_intermediate_size, **kinds)

    def __call__(
        self, x: jax.Array, text: LayerCache, sound: LayerCache, pos: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        y = self.norm(x)
        text = update_cache(text, **self.attention.keys(y), pos=pos)
        q = self.attention.queries(y)
        x = x + self.attention.join(cached_attention(q, **text, pos=pos, how=Scores(q.shape[-1] ** -0.5)))
        x = x + self.cross.join(attend(self.cross.queries(self.cross_norm(x)), **sound))
        return x + self.mlp(x), text


class Encoder(nnx.Module):
    """Two convolutions over time, of which the second halves it, and layers of attention."""

    def __init__(self, config: WhisperConfig, **kinds: Any):
        conv = partial(nnx.Conv, out_features=config.hidden_size, kernel_size=(3,), padding=[(1, 1)], **kinds)
        self.conv1 = conv(config.num_mel_bins)
        self.conv2 = conv(config.hidden_size, strides=(2,))
        self.positions = nnx.Embed(config.audio_len, config.hidden_size, **kinds)
        self.layers = nnx.List([EncoderBlock(config, **kinds) for _ in range(config.encoder_layers)])
        self.norm = layer_norm(config.hidden_size, **kinds)

    def __call__(self, features: jax.Array) -> jax.Array:
        gelu = partial(nnx.gelu, approximate=False)
        x = gelu(self.conv2(gelu(self.conv1(features))))
        x = x + self.positions(jnp.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Decoder(nnx.Module):
    """Layers of attention to a text and to a sound."""

    def __init__(self, config: WhisperConfig, **kinds: Any):
        self.words = nnx.Embed(config.vocab_size, config.hidden_size, **kinds)
        self.positions = nnx.Embed(config.max_len, config.hidden_size, **kinds)
        self.layers = nnx.List([DecoderBlock(config, **kinds) for _ in range(config.decoder_layers)])
        self.norm = layer_norm(config.hidden_size, **kinds)


class Whisper(nnx.Module):
    """A model that writes down what is said.

    Args:
      config: its shape.
      dtype: of activations and cache.
      param_dtype: of parameters; ``dtype`` unless given.
      rngs: for the initial weights (``models.common.initialize.random_model`` is much faster for large ones).
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        kinds = dict(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, **kinds)
        self.decoder = Decoder(config, **kinds)

    def encode(self, features: jax.Array) -> jax.Array:
        """What the decoder attends to: ``[B, F / 2, hidden_size]``.

        Args:
          features: a log-mel spectrogram ``[B, F, num_mel_bins]`` of ``F = 2 * audio_len`` frames.
        """
        return self.encoder(features)

    def init_cache(self, encoded: jax.Array, max_len: int) -> Cache:
        """The cache before the first token: for each layer ``text``, empty, and ``sound``, keys and values of ``encoded``.

        Each of them is ``dict(k, v)`` of ``[B, max_len, H, D]``, or ``[B, F / 2, H, D]``.
        """
        heads = self.config.decoder_heads
        empty = jnp.zeros((encoded.shape[0], max_len, heads, self.config.hidden_size // heads), self.dtype)
        return [dict(text=dict(k=empty, v=empty), sound=layer.cross.keys(encoded)) for layer in self.decoder.layers]

    def __call__(self, tokens: jax.Array, cache: Cache, pos: jax.Array) -> tuple[jax.Array, Cache]:
        """Run ``tokens`` at consecutive positions after what the cache already holds.

        Args:
          tokens: int32 ``[B, T]``.
          cache: see ``init_cache``; ``pos + T <= max_len``.
          pos: int32 scalar, the position of ``tokens[:, 0]``.

        Returns:
          Logits, float32 ``[B, T, vocab_size]``, and the updated cache.
        """
        decoder = self.decoder
        x = decoder.words(tokens) + decoder.positions(pos + jnp.arange(tokens.shape[1]))
        updated = []
        for layer, old in zip(decoder.layers, cache, strict=True):
            x, text = layer(x, old["text"], old["sound"], pos)
            updated.append(dict(text=text, sound=old["sound"]))
        words = decoder.words.embedding[...].astype(self.dtype)
        return jnp.einsum("btd,vd->btv", decoder.norm(x), words, preferred_element_type=jnp.float32), updated
