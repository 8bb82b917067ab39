"""Attention, row operators and sorting on the GPU, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from tests.device import programs

pytestmark = pytest.mark.device

SHAPES = [(1, 8, 4, 64, 1024), (1, 8, 2, 128, 640), (3, 2, 5, 128, 96), (20, 8, 4, 64, 256), (1, 2, 3, 24, 50),
          (3, 2, 5, 32, 200), (1, 2, 1, 96, 130), (2, 1, 12, 96, 600), (8, 8, 8, 64, 700), (1, 1, 12, 128, 300),
          (1, 1, 8, 256, 290), (2, 4, 2, 256, 700), (1, 1, 2, 160, 40), (16, 8, 4, 128, 1500)]  # fmt: skip


def run(f, **jit):
    return jax.jit(jax_mpk.megakernelize(f, implementation="cuda"), **jit)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_attention(shape, dtype):
    q, k, v, pos, kc, vc = programs.attend_operands(*shape, dtype)
    f, S = run(programs.attend), shape[-1]
    for first in (0, S // 2, S - 1):
        pos = np.minimum(first + np.arange(shape[0]), S - 1).astype(np.int32)
        got, k2, v2 = (np.asarray(x) for x in f(q, k, v, pos, kc, vc))
        want, want_k, want_v = programs.attend_reference(q, k, v, pos, kc, vc)
        assert (k2 == want_k).all() and (v2 == want_v).all()
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < (4e-3 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(1, 128256), (5, 1000), (33, 40)])
def test_rows(shape):
    x = programs.rows_operand(*shape)
    got, want = run(programs.rows)(x), programs.rows_reference(x)
    assert (got[0] == want[0]).all() and (got[2] == want[2]).all()
    assert np.abs(got[1] - want[1]).max() < 1e-6
    x[:, 30] = np.nan
    assert (np.asarray(run(programs.rows)(x)[0]) == 30).all()


@pytest.mark.parametrize("n,count", [(100, 100), (2048, 50), (40000, 8)])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_sort(n, count, descending, positions):
    x = programs.sort_operand(n)
    got = np.asarray(run(programs.sort(count, descending, positions))(x))
    assert (got == programs.sort_reference(x, count, descending, positions)).all()
