"""The Mamba-2 language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from models.mamba2.config import Mamba2Config
from models.mamba2.ssm import many_steps, one_step

LayerCache = dict[str, jax.Array]
Cache = list[LayerCache]


def init_cache(config: Mamba2Config, batch: int, dtype: DTypeLike = jnp.bfloat16) -> Cache:
    """The cache before the first token, of a size that does not depend on how many will follow.

    For each layer zeros: ``conv`` ``[batch, conv_size - 1, conv_width]`` in ``dtype``, what the convolution will see of the
    past, and ``ssm`` ``[batch, num_heads, head_dim, state_size]`` in float32.
    """
    conv = (batch, config.conv_size - 1, config.conv_width)
    ssm = (batch, config.num_heads, config.head_dim, config.state_size)
    return [dict(conv=jnp.zeros(conv, dtype), ssm=jnp.zeros(ssm, jnp.float32)) for _ in range(config.num_layers)]


class GatedNorm(nn.Module):
    """RMS norm of ``x * silu(gate)`` within each of ``groups`` equal parts of the last axis."""

    groups: int
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.dtype)
        x = x * nn.silu(gate.astype(jnp.float32))
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + self.eps)
        return (parts.reshape(x.shape) * scale.astype(jnp.float32)).astype(self.dtype)


class Mixer(nn.Module):
    """A causal convolution and a selective state space, between two projections."""

    config: Mamba2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, u: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        config, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.dtype)
        batch, length, _ = u.shape
        inner, width, heads = config.inner_size, config.conv_width, config.num_heads
        projected = nn.Dense(inner + width + heads, use_bias=config.use_bias, name="into", **kinds)(u)
        gate, x, step = jnp.split(projected, [inner, inner + width], axis=-1)

        seen = jnp.concatenate([cache["conv"].astype(self.dtype), x], axis=1)
        x = nn.Conv(
            width,
            (config.conv_size,),
            padding="VALID",
            feature_group_count=width,
            use_bias=config.use_conv_bias,
            name="conv",
            **kinds,
        )(seen)
        x = nn.silu(x.astype(jnp.float32))
        x, into, out = jnp.split(x, [inner, (inner + width) // 2], axis=-1)
        x = x.reshape(batch, length, heads, config.head_dim)
        into, out = (part.reshape(batch, length, config.num_groups, config.state_size) for part in (into, out))

        def of_heads(name: str) -> jax.Array:
            return self.param(name, nn.initializers.ones, (heads,), self.dtype).astype(jnp.float32)

        step = jax.nn.softplus(step.astype(jnp.float32) + of_heads("step_bias"))
        step = jnp.clip(step, *config.step_range)
        rate = -jnp.exp(of_heads("log_rate"))
        if length == 1:
            y, state = one_step(cache["ssm"], x[:, 0], step[:, 0], rate, into[:, 0], out[:, 0])
            y = y[:, None]
        else:
            y, state = many_steps(cache["ssm"], x, step, rate, into, out, config.chunk_size)
        y = (y + of_heads("skip")[:, None] * x).reshape(batch, length, inner)
        y = GatedNorm(config.num_groups, config.norm_eps, self.dtype, name="norm")(y, gate)
        y = nn.Dense(config.hidden_size, use_bias=config.use_bias, name="out", **kinds)(y)
        return y, dict(conv=seen[:, length:].astype(cache["conv"].dtype), ssm=state)


class Mamba2(nn.Module):
    """A language model of Mamba-2 blocks.

    Attributes:
      config: its shape.
      dtype: of parameters, activations and the part of the cache that is for convolutions.
    """

    config: Mamba2Config
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Any]:
        """Run ``tokens`` after what the cache has seen.

        Args:
          tokens: int32 ``[B, T]``; with ``T`` of 1 this is a step, otherwise it goes chunk by chunk.
          cache: see ``init_cache``.

        Returns:
          Logits, float32 ``[B, T, vocab_size]``, and the new cache.
        """
        config, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.dtype)
        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed", **kinds)
        x = embed(tokens).astype(jnp.float32 if config.wide_residual else self.dtype)
        updated = []
        for index, layer_cache in enumerate(cache):
            y = nn.RMSNorm(epsilon=config.norm_eps, name=f"norm_{index}", **kinds)(x)
            y, layer_cache = Mixer(config, self.dtype, name=f"mixer_{index}")(y, layer_cache)
            x = x + y.astype(x.dtype)
            updated.append(layer_cache)
        x = nn.RMSNorm(epsilon=config.norm_eps, name="norm", **kinds)(x)
        if not config.tie_embeddings:
            head = self.param(
                "head", nn.initializers.lecun_normal(), (config.hidden_size, config.vocab_size), self.dtype
            )
            return jnp.einsum("...d,dv->...v", x, head, preferred_element_type=jnp.float32), updated
        logits = jnp.einsum("...d,vd->...v", x, embed.embedding.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits, updated


def greedy_step(model: Mamba2, params: Any, token: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
    """One step, and the likeliest token after it.

    Args:
      token: int32 ``[B]``.

    Returns:
      int32 ``[B]``, float32 logits ``[B, vocab_size]``, and the new cache.
    """
    logits, cache = model.apply({"params": params}, token[:, None], cache)
    return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), logits[:, 0], cache
