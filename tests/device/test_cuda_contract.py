"""Chains of contractions on the GPU: streamed and direct weights, both layouts, batches, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk.backends.cuda import backend as cuda
from tests.device import programs

pytestmark = pytest.mark.device


def run(f, **options):
    return jax.jit(jax_mpk.megakernelize(f, implementation="cuda", options=options))


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("columns_inner", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8, 16, 33])
@pytest.mark.parametrize("stream", [True, False])
def test_bf16(batch, columns_inner, stream):
    x, w = programs.chain_operands(batch, 512, 1024, 2)
    f = run(programs.chain(columns_inner=columns_inner), stream=stream)
    held = [jnp.asarray(a) for a in programs.layout(w, columns_inner)]
    got = [np.asarray(f(x, *held)) for _ in range(3)]
    assert error(got[0], programs.chain_reference(x, w)) < 3e-3
    assert all((g == got[0]).all() for g in got), "launches differ"


def test_rows_do_not_depend_on_their_neighbours():
    x, w = programs.chain_operands(16, 512, 1024, 2)
    held = list(map(jnp.asarray, w))
    got = {batch: np.asarray(run(programs.chain())(x[:batch], *held)) for batch in (1, 5, 16)}
    assert (got[1][0] == got[16][0]).all() and (got[5] == got[16][:5]).all()


@pytest.mark.parametrize("columns_inner", [True, False])
def test_f32(columns_inner):
    x, w = programs.chain_operands(2, 384, 640, 2, np.float32)
    f = run(programs.chain(dtype=jnp.float32, columns_inner=columns_inner))
    got = np.asarray(f(x, *map(jnp.asarray, programs.layout(w, columns_inner))))
    assert error(got, programs.chain_reference(x, w, round_=False)) < 1e-5


def test_ragged_depth():
    """k that is no multiple of a frame, columns that are no multiple of a tile."""
    x, w = programs.chain_operands(2, 200, 328, 1)
    got = np.asarray(run(programs.chain())(x, *map(jnp.asarray, w)))
    assert error(got, programs.chain_reference(x, w)) < 3e-3


def test_many_launches_in_a_loop_and_in_command_buffers():
    x, w = programs.chain_operands(1, 512, 1024, 1)
    held = list(map(jnp.asarray, w))
    one = run(programs.chain())
    want = jnp.asarray(x)
    for _ in range(20):
        want = one(want, *held) * 0.5
    looped = jax.jit(lambda x, *w: jax.lax.fori_loop(0, 20, lambda _, v: one(v, *w) * 0.5, x))
    for _ in range(5):
        got = looped(jnp.asarray(x), *held)
    assert (np.asarray(got) == np.asarray(want)).all()
    cuda.check()
