"""Functions that reach one way of the kernel each, with operands and NumPy references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


def chain(*, dtype: Any = jnp.bfloat16, columns_inner: bool = True) -> Callable[..., jax.Array]:
    """`f(x, gate0, up0, down0, gate1, ...)`: gated layers with a norm before and a residual around each; x is f32, weights
    are `[K, N]`, or `[N, K]` unless `columns_inner`."""

    def mul(a: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.matmul(a, w if columns_inner else w.T, preferred_element_type=jnp.float32)

    def f(x: jax.Array, *weights: jax.Array) -> jax.Array:
        for n in range(0, len(weights), 3):
            gate, up, down = weights[n : n + 3]
            h = (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)).astype(dtype)
            x = x + mul((jax.nn.silu(mul(h, gate)) * mul(h, up)).astype(dtype), down)
        return x

    return f


def chain_operands(batch: int, d: int, ff: int, layers: int, dtype: Any = BF16) -> tuple[np.ndarray, list[np.ndarray]]:
    """x, and weights as `[K, N]`."""
    rng = np.random.default_rng(batch + d + layers)
    x = rng.standard_normal((batch, d), np.float32)
    shapes = [(d, ff), (d, ff), (ff, d)] * layers
    return x, [(rng.standard_normal(s, np.float32) / np.sqrt(s[0])).astype(dtype) for s in shapes]


def chain_reference(x: np.ndarray, weights: list[np.ndarray], round_: bool = True) -> np.ndarray:
    """The same in NumPy, f64 sums, activations rounded to bf16 where the function rounds them."""
    r = (lambda a: a.astype(np.float32).astype(BF16).astype(np.float64)) if round_ else (lambda a: a)
    x = x.astype(np.float64)
    for n in range(len(weights) // 3):
        gate, up, down = (w.astype(np.float64) for w in weights[3 * n : 3 * n + 3])
        h = r(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6))
        g, u = h @ gate, h @ up
        x = x + r(g / (1 + np.exp(-g)) * u) @ down
    return x


def layout(weights: list[np.ndarray], columns_inner: bool) -> list[np.ndarray]:
    """The weights as `chain(columns_inner=...)` takes them."""
    return weights if columns_inner else [w.T.copy() for w in weights]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, kc: jax.Array, vc: jax.Array
) -> tuple[jax.Array, ...]:
    """A new row of keys and values into caches `[B, S, H, D]` at each row's own place, then attention of `q [B, H, G, D]`
    over what is there."""
    rows = jnp.arange(kc.shape[0])
    kc, vc = kc.at[rows, pos].set(k.astype(kc.dtype)), vc.at[rows, pos].set(v.astype(vc.dtype))
    s = jnp.einsum("bhgd,bshd->bhgs", q * q.shape[-1] ** -0.5, kc, preferred_element_type=jnp.float32)
    s = jnp.where(jnp.arange(kc.shape[1]) <= pos[:, None, None, None], s, -jnp.inf)
    p = jax.nn.softmax(s, -1)
    return jnp.einsum("bhgs,bshd->bhgd", p, vc, preferred_element_type=jnp.float32), kc, vc


def attend_operands(B: int, H: int, G: int, D: int, S: int, dtype: Any) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(S)
    q, k, v = (rng.standard_normal(s, np.float32) for s in ((B, H, G, D), (B, H, D), (B, H, D)))
    kc, vc = (rng.standard_normal((B, S, H, D), np.float32).astype(dtype) for _ in range(2))
    return q, k, v, np.minimum(S // 2 + np.arange(B), S - 1).astype(np.int32), kc, vc


def attend_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, pos: np.ndarray, kc: np.ndarray, vc: np.ndarray
) -> Any:
    """The result, and the caches."""
    B, S, D = kc.shape[0], kc.shape[1], q.shape[-1]
    kc, vc = kc.copy(), vc.copy()
    kc[np.arange(B), pos], vc[np.arange(B), pos] = k.astype(kc.dtype), v.astype(vc.dtype)
    s = np.einsum("bhgd,bshd->bhgs", q.astype(np.float64) * D**-0.5, kc.astype(np.float64))
    s = np.where(np.arange(S) <= pos[:, None, None, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhgs,bshd->bhgd", p / p.sum(-1, keepdims=True), vc.astype(np.float64)), kc, vc


def rows(x: jax.Array) -> tuple[jax.Array, ...]:
    """A reduction to a place, two reductions and a row, and pieces."""
    edge = jnp.concatenate([x[:, :3], x[:, 3:10] + 1, x[:, 10:]], 1)
    return jnp.argmax(x, -1).astype(jnp.int32), jax.nn.softmax(x, -1), edge


def rows_operand(B: int, N: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((B, N), np.float32)
    x[0, [7, 20]] = 9.0  # a tie: the first wins
    return x


def rows_reference(x: np.ndarray) -> tuple[np.ndarray, ...]:
    p = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    edge = x.copy()
    edge[:, 3:10] += 1
    return x.argmax(-1).astype(np.int32), p / p.sum(-1, keepdims=True), edge


def sort(count: int, descending: bool, positions: bool) -> Callable[[jax.Array], jax.Array]:
    """The first of each sorted row, or where they were."""

    def f(x: jax.Array) -> jax.Array:
        if positions:
            return jnp.argsort(x, -1, descending=descending)[:, :count].astype(jnp.int32)
        return jnp.sort(x, -1, descending=descending)[:, :count]

    return f


def sort_operand(n: int) -> np.ndarray:
    return np.round(np.random.default_rng(n).standard_normal((3, n), np.float32) * 50) / 8  # many equal keys


def sort_reference(x: np.ndarray, count: int, descending: bool, positions: bool) -> np.ndarray:
    at = np.argsort(-x if descending else x, axis=-1, kind="stable")[:, :count]
    return at.astype(np.int32) if positions else np.take_along_axis(x, at, -1)
