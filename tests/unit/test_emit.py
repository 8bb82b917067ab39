"""Programs on the virtual machine of `tests/vm.py` against the interpreter of graphs, for functions of every kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

sys.path.insert(0, str(Path(__file__).parents[1]))

import vm

from jax_mpk.emit import emit
from jax_mpk.frontend import lower
from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Graph
from jax_mpk.passes import (
    decompose,
    dependencies,
    events,
    fuse,
    linearise,
    memory,
    normalise,
    placement,
    recognise,
    refine,
    simplify,
)  # fmt: skip
from jax_mpk.targets import Target

SMALL = Target("cpu", workers=2, columns=16, tasks=5)
"""Cuts even small operators, at places that do not divide them."""


def finish(g: Graph, target: Target = SMALL) -> bytes:
    """The program of a refined graph."""
    tg = decompose.run(g, target)
    for p in (dependencies, events, normalise, linearise):
        tg = p.run(tg)
    return emit(g, memory.run(placement.run(tg, g, target)))


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "MIN_COST", 64)
    monkeypatch.setattr(decompose, "MIN_MACS", 256)


def graphs(f: Callable[..., Any], *args: Any) -> list[Graph]:
    """The graph as it is lowered, and as it is fused: different operators for the same function."""
    plain = lower(jax.make_jaxpr(f)(*args))
    return [plain, fuse.run(recognise.run(simplify.run(plain)), SMALL)]


def close(have: np.ndarray, want: np.ndarray, name: str = "") -> None:
    assert have.dtype == want.dtype and have.shape == want.shape
    if have.dtype.kind in "iub":
        np.testing.assert_array_equal(have, want, name)
        return
    eps = {"float32": 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[have.dtype.name]
    scale = np.abs(want[np.isfinite(want)].astype(np.float64)).max(initial=1e-30)
    have, want = have.astype(np.float64), want.astype(np.float64)
    np.testing.assert_allclose(have, want, rtol=8 * eps, atol=eps * scale, err_msg=name)


def same(f: Callable[..., Any], *args: Any) -> list[Graph]:
    """Refined graph and program give what the graph gives; returns the refined graphs."""
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    out = []
    for n, g in enumerate(graphs(f, *args)):
        want = interpret.run(g, flat)
        r = refine.run(g)
        for i, (x, y) in enumerate(zip(interpret.run(r, flat), want, strict=True)):
            close(x, y, f"refined graph {n}, result {i}")
        blob = finish(r)
        for i, (x, y) in enumerate(zip(vm.results(blob, flat, want), want, strict=True)):
            close(x, y, f"program of graph {n}, result {i}")
        out.append(r)
    return out


def data(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape, np.float32).astype(dtype)


def ints(high: int, *shape: int, low: int = 0, dtype: Any = np.int32) -> np.ndarray:
    return np.random.default_rng(7).integers(low, high, shape).astype(dtype)


def gated(h: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.nn.silu(h @ a) * (h @ b)


F32, BF16 = jnp.float32, jnp.bfloat16

CASES: dict[str, tuple[Callable[..., Any], tuple]] = {
    "scalar": (lambda x, y: jnp.sin(x) * y + 1, (np.float32(0.3), np.float32(2.0))),
    "elementwise": (lambda x, y: (jnp.exp(x) - y / 3, jnp.tanh(y)), (data(5, 7), data(5, 7, seed=1))),
    "broadcast": (lambda x, y: x[:, None, None] * y[None] + 2, (data(5), data(3, 7))),
    "bf16": (lambda x, y: (x * y + x) * y, (data(3, 33, dtype=BF16), data(3, 33, dtype=BF16, seed=1))),
    "f16": (lambda x: jnp.exp(x) * x, (data(70, dtype=np.float16),)),
    "unsigned": (lambda x, y: (x // (y | 1), x % (y | 1), x >> 3, jnp.maximum(x, y), x < y),
                 (ints(1 << 30, 21, dtype=np.uint32) * np.uint32(7), ints(99, 21, dtype=np.uint32))),
    "integers": (lambda x, y: (x // (y | 1), lax.rem(x, y), x >> 2, x << 3, abs(x), jnp.sign(x), ~x,
                               lax.population_count(x)),
                 (ints(99, 25, low=-99), ints(9, 25, low=-9))),
    "small integers": (lambda x, y: (x + y, x * y, x.astype(jnp.int32) * 1000, x > y),
                       (ints(100, 9, low=-100, dtype=np.int8), ints(100, 9, low=-100, dtype=np.int8))),
    "bools": (lambda x: (x & (jnp.arange(11) > 4), ~x, jnp.any(x), jnp.all(x), x.astype(F32)), (ints(2, 11) == 1,)),
    "concatenate": (lambda x, y: jnp.concatenate([x, jnp.sin(y), x[:, :2]], 1) * 2, (data(4, 5), data(4, 3))),
    "concatenate rows": (lambda x, y: jnp.concatenate([x, y]).reshape(-1) + 1, (data(4, 5), data(3, 5))),
    "concatenate, reshape": (lambda x, y: jnp.concatenate([x, y]).reshape(3, -1) + 1, (data(4), data(5))),
    "concatenate, reverse": (lambda x, y: jnp.concatenate([x, y])[::-1] + jnp.arange(9.0), (data(4), data(5))),
    "concatenate, stride": (lambda x, y: jnp.concatenate([x, y])[1::3] * 1.0, (data(7), data(9))),
    "concatenate, sum": (lambda x, y: jnp.concatenate([x, y * 2], 1).sum(1), (data(4, 50), data(4, 3))),
    "concatenate, max": (lambda x, y: jnp.concatenate([x, y * 2], 1).max(1), (data(4, 50), data(4, 3))),
    "concatenate, argmax": (lambda x, y: jnp.argmax(jnp.concatenate([x, y * 2], 1), 1), (data(4, 50), data(4, 9))),
    "pad": (lambda x: jnp.pad(x, ((1, 2), (3, 0)), constant_values=5.0), (data(4, 5),)),
    "rotate half": (lambda x, c: x * c + jnp.concatenate([-x[..., 4:], x[..., :4]], -1), (data(3, 2, 8), data(8))),
    "interleave": (lambda x: jnp.stack([x[:, 0::2], -x[:, 1::2]], -1).reshape(x.shape), (data(3, 8),)),
    "transpose": (lambda x: x.transpose(2, 0, 1) * 2, (data(3, 5, 7),)),
    "reshape": (lambda x: x.reshape(5, 6).T.reshape(3, 10) + 1, (data(30),)),
    "reshape, odd": (lambda x: x.reshape(6, 10).T.reshape(4, 15) + x.reshape(4, 15), (data(60),)),
    "repeat": (lambda x: jnp.repeat(x, 3, 1) + jnp.tile(x, (1, 3)), (data(4, 5),)),
    "repeat, odd": (lambda x: jnp.repeat(x, 4) + jnp.tile(x, 4) + jnp.repeat(x[:4], 6), (data(6),)),
    "iota": (lambda x: x.reshape(6) + lax.broadcasted_iota(F32, (2, 3), 1).reshape(6), (data(2, 3),)),
    "sums": (lambda x: (x.sum(), x.sum(0), x.sum(1), x.sum((0, 2)), x.mean()), (data(5, 17, 3),)),
    "softmax": (lambda x: jax.nn.softmax(x * 3), (data(5, 37),)),
    "log softmax": (lambda x: jax.nn.log_softmax(x.astype(F32), 0), (data(5, 37, dtype=BF16),)),
    "layernorm": (lambda x, s: (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5) * s,
                  (data(5, 37), data(37))),
    "nested": (lambda x, y: jnp.sum(jnp.exp(x[:, :, None] - jnp.max(y, -1)[None, :, None]), (1, 2)),
               (data(3, 4), data(4, 6))),
    "nested, argmax": (lambda x: jnp.argmax(x.reshape(4, 5, 6).sum(2), 1), (data(4, 30),)),
    "argmin": (lambda x: (jnp.argmin(x, 0), jnp.argmax(x, 1)), (data(9, 40),)),
    "products": (lambda x: (jnp.prod(x, 1), jnp.min(x, 1), jnp.max(x)), (data(3, 21),)),
    "integer sums": (lambda x: (x.sum(1), x.max(0), x.min()), (ints(1 << 30, 3, 21),)),
    "gather": (lambda t, i: t[i] * 2, (data(11, 5), ints(11, 4))),
    "gather of gather": (lambda t, i, j: t[i[j]] + 1, (data(11, 5), ints(11, 4), ints(4, 6))),
    "take along axis": (lambda x, i: jnp.take_along_axis(x, i, 1), (data(4, 9), ints(9, 4, 3))),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i, 1), (3, 4)), (data(9, 7), np.int32(8))),
    "update": (lambda x, y, i: lax.dynamic_update_slice(x * 1, y, (i, jnp.int32(1))),
               (data(9, 7), data(2, 3), np.int32(8))),
    "scatter": (lambda x, i, y: x.at[i].set(y, mode="drop"), (data(9, 5), np.array([3, 12, 0], np.int32), data(3, 5))),
    "scatter add": (lambda x, i, y: x.at[i].add(y), (data(9, 5), np.array([3, 0, 3, 8], np.int32), data(4, 5))),
    "scatter add, drop": (lambda x, i, y: x.at[i].add(y, mode="drop"),
                          (ints(9, 9), np.array([3, 9, 3], np.int32), ints(9, 3))),
    "matmul": (lambda x, w: x @ w, (data(5, 19), data(19, 37))),
    "matmul, transposed": (lambda x, w: x @ w.T, (data(5, 19), data(37, 19))),
    "matvec": (lambda x, w: x @ w, (data(19), data(19, 37))),
    "dot": (lambda x, w: jnp.dot(x, w), (data(19), data(19, seed=1))),
    "outer": (lambda x, w: jnp.einsum("i,j->ij", x, w), (data(9), data(5))),
    "matmul, bf16": (lambda x, w: jax.nn.silu(x @ w), (data(3, 24, dtype=BF16), data(24, 40, dtype=BF16))),
    "norm, two matmuls": (
        lambda x, s, a, b: gated(x * lax.rsqrt((x * x).mean(1, keepdims=True) + 1e-6) * s, a, b),
        (data(3, 24), data(24), data(24, 33), data(24, 33, seed=1))),
    "matmul of concatenation": (lambda x, y, w: jnp.concatenate([x, y], 1) @ w,
                                (data(3, 10), data(3, 9), data(19, 20))),
    "batched": (lambda x, w: jnp.einsum("bhd,hde->bhe", x, w), (data(3, 4, 6), data(4, 6, 10))),
    "batched, permuted": (lambda x, w: jnp.einsum("bhd,hed->ebh", x, w), (data(3, 4, 6), data(4, 10, 6))),
    "two contracted axes": (lambda x, w: jnp.einsum("bhd,hdn->bn", x, w), (data(3, 4, 6), data(4, 6, 20))),
    "contracted axes, permuted": (lambda x, w: jnp.einsum("bhd,dhn->bn", x, w), (data(3, 4, 6), data(6, 4, 20))),
    "contracted axes apart": (lambda x, w: jnp.einsum("bhd,hnd->bn", x, w), (data(3, 4, 6), data(4, 20, 6))),
    "columns apart": (lambda x, w: jnp.einsum("bk,hkd->bhd", x, w), (data(3, 6), data(4, 6, 8))),
    "sliced weight": (lambda x, w: jnp.einsum("bk,khd->bhd", x, w[:, :, 2:6]), (data(3, 6), data(6, 4, 8))),
    "gathered weight": (lambda x, w, e: x @ w[e], (data(3, 6), data(5, 6, 20), np.int32(3))),
    "grouped": (lambda q, k: jnp.einsum("hgd,shd->hgs", q.reshape(2, 3, 8), k), (data(6, 8), data(10, 2, 8))),
    "integer matmul": (lambda x, w: x @ w, (ints(9, 4, 7), ints(9, 7, 5))),
    "sort": (lambda x: (jnp.sort(x, 1), jnp.argsort(x, 1)), (data(4, 13),)),
    "sort, integers": (lambda x: jnp.sort(x), (ints(5, 30),)),
    "top k": (lambda x: lax.top_k(x, 3), (data(4, 13),)),
    "top k, bf16": (lambda x: lax.top_k(x * 2, 5), (data(2, 40, dtype=BF16),)),
    "six axes": (lambda x: x.transpose(5, 3, 1, 0, 2, 4) + 1, (data(2, 3, 2, 2, 3, 2),)),
    "units": (lambda x: x.reshape(1, 4, 1, 5).sum((0, 2), keepdims=True) * 2, (data(4, 5),)),
    "cumulative": (lambda x: jnp.cumsum(x, 1), (data(3, 17),)),
    "constants": (lambda x: x + np.arange(12, dtype=np.float32).reshape(3, 4) * np.float32(1.5), (data(3, 4),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_function(name: str) -> None:
    f, args = CASES[name]
    same(f, *args)
