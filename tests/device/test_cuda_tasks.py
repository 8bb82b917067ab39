"""Attention, row operators and sorting on the GPU, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import launch
import ml_dtypes
import numpy as np
import programs
import pytest

pytestmark = pytest.mark.device


@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 4, 64, 1024),
        (1, 8, 2, 128, 640),
        (3, 2, 5, 128, 96),
        (20, 8, 4, 64, 256),
        (1, 2, 3, 24, 50),
        (3, 2, 5, 32, 200),
        (1, 2, 1, 96, 130),
        (2, 1, 12, 96, 600),
        (8, 8, 8, 64, 700),
        (1, 1, 12, 128, 300),
        (1, 1, 8, 256, 290),
        (2, 4, 2, 256, 700),
        (1, 1, 2, 160, 40),
        (16, 8, 4, 128, 1500),
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_attention(shape, dtype):
    B, H, G, D, S = shape
    rng = np.random.default_rng(S)
    kind = ml_dtypes.bfloat16 if dtype == "BF16" else np.float32
    q, k, v = (rng.standard_normal(s, np.float32) for s in ((B, H, G, D), (B, H, D), (B, H, D)))
    kc, vc = (rng.standard_normal((B, S, H, D), np.float32).astype(kind) for _ in range(2))
    results = [((B, H, G, D), jnp.float32), ((B, S, H, D), kind), ((B, S, H, D), kind)]
    blob = programs.attention_step(B, H, G, D, S, dtype)
    f = jax.jit(launch.function(blob, results, launch.device(), aliases={4: 1, 5: 2}))
    for first in (0, S // 2, S - 1):
        pos = np.minimum(first + np.arange(B), S - 1).astype(np.int32)
        got, k2, v2 = (np.asarray(x) for x in f(q, k, v, pos, kc, vc))
        want_k, want_v = kc.copy(), vc.copy()
        want_k[np.arange(B), pos], want_v[np.arange(B), pos] = k.astype(kind), v.astype(kind)
        assert (k2 == want_k).all() and (v2 == want_v).all()
        s = np.einsum("bhgd,bshd->bhgs", q.astype(np.float64) * D**-0.5, want_k.astype(np.float64))
        s = np.where(np.arange(S) <= pos[:, None, None, None], s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        want = np.einsum("bhgs,bshd->bhgd", p / p.sum(-1, keepdims=True), want_v.astype(np.float64))
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


@pytest.mark.parametrize("shape", [(1, 128256), (5, 1000), (33, 40)])
def test_rows(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    x[0, [7, 20]] = 9.0  # a tie: the first wins
    results = [(shape[:1], jnp.int32), (shape, jnp.float32), (shape, jnp.float32)]
    top, soft, edge = (
        np.asarray(a) for a in jax.jit(launch.function(programs.rows_program(*shape), results, launch.device()))(x)
    )
    assert (top == x.argmax(-1)).all()
    p = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    assert np.abs(soft - p / p.sum(-1, keepdims=True)).max() < 1e-6
    want = x.copy()
    want[:, 3:10] += 1
    assert (edge == want).all()
    x[:, 30] = np.nan
    assert (
        np.asarray(jax.jit(launch.function(programs.rows_program(*shape), results, launch.device()))(x)[0]) == 30
    ).all()


@pytest.mark.parametrize("n,count", [(100, 100), (2048, 50), (40000, 8)])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_sort(n, count, descending, positions):
    x = np.round(np.random.default_rng(n).standard_normal((3, n), np.float32) * 50) / 8  # many equal keys
    blob = programs.sort_program(3, n, count, descending, positions)
    got = np.asarray(
        jax.jit(launch.function(blob, [((3, count), jnp.int32 if positions else jnp.float32)], launch.device()))(x)[0]
    )
    at = np.argsort(-x if descending else x, axis=-1, kind="stable")[:, :count]
    assert (got == (at if positions else np.take_along_axis(x, at, -1))).all()
