"""A mixture of experts: a router, and gated feed-forward blocks of which each token goes through a few."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models.qwen3_moe.config import Qwen3MoeConfig


class Experts(nnx.Module):
    """The feed-forward block of experts. No token is dropped, however many choose the same expert.

    Attributes:
      gate, up: ``[experts, hidden_size, intermediate_size]``.
      down: ``[experts, intermediate_size, hidden_size]``.
    """

    def __init__(self, config: Qwen3MoeConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.per_token, self.renormalise, self.dtype = config.experts_per_token, config.renormalise, dtype
        self.router = nnx.Linear(
            config.hidden_size,
            config.num_experts,
            use_bias=False,
            # Two experts are often nearly as good as each other: in bfloat16 they would be equal.
            preferred_element_type=jnp.float32,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        into = (config.num_experts, config.hidden_size, config.intermediate_size)
        out = (config.num_experts, config.intermediate_size, config.hidden_size)
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = nnx.Param(init(rngs.params(), into, param_dtype))
        self.up = nnx.Param(init(rngs.params(), into, param_dtype))
        self.down = nnx.Param(init(rngs.params(), out, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        # Up to here a copy of each chosen expert is no more than all experts, and needs no sorting.
        few = chosen.size <= self.gate.shape[0]
        outputs = self.one_by_one(rows, chosen) if few else self.grouped(rows, chosen)
        mixed = jnp.einsum("nkd,nk->nd", outputs, weights, preferred_element_type=jnp.float32)
        return mixed.astype(x.dtype).reshape(x.shape)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each row of ``x`` (``[N, hidden_size]``) and their weights, float32; both ``[N, per_token]``."""
        weights, chosen = lax.top_k(nnx.softmax(self.router(x), axis=-1), self.per_token)
        if self.renormalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return weights, chosen

    def one_by_one(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """What each chosen expert makes of its row, ``[N, per_token, hidden_size]``, with the experts gathered."""
        gate, up, down = (part[...].astype(self.dtype)[chosen] for part in (self.gate, self.up, self.down))
        hidden = nnx.silu(jnp.einsum("nd,nkdf->nkf", x, gate)) * jnp.einsum("nd,nkdf->nkf", x, up)
        return jnp.einsum("nkf,nkfd->nkd", hidden, down)

    def grouped(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """The same as ``one_by_one``, with the rows sorted by expert."""
        gate, up, down = (part[...].astype(self.dtype) for part in (self.gate, self.up, self.down))
        experts = chosen.reshape(-1)
        order = jnp.argsort(experts)
        sizes = jnp.bincount(experts, length=gate.shape[0])
        rows = x[order // self.per_token]
        hidden = nnx.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
        outputs = lax.ragged_dot(hidden, down, sizes)
        return outputs[jnp.argsort(order)].reshape(*chosen.shape, -1)
