"""Chains of contractions on the GPU: streamed and direct weights, both layouts, batches, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import launch
import ml_dtypes
import numpy as np
import programs
import pytest

pytestmark = pytest.mark.device


def operands(
    batch: int, d: int, ff: int, layers: int, dtype: type, columns_inner: bool = True
) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(batch + d + layers)
    x = rng.standard_normal((batch, d), np.float32)
    shapes = [(d, ff), (d, ff), (ff, d)] * layers
    return x, [(rng.standard_normal(s, np.float32) / np.sqrt(s[0])).astype(dtype) for s in shapes]


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("columns_inner", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8, 16, 33])
@pytest.mark.parametrize("stream", [True, False])
def test_bf16(batch, columns_inner, stream):
    d, ff, layers = 512, 1024, 2
    x, w = operands(batch, d, ff, layers, ml_dtypes.bfloat16)
    blob = programs.decoder_step(batch, d, ff, layers, columns_inner=columns_inner)
    f = jax.jit(launch.function(blob, [((batch, d), jnp.float32)], launch.device(stream=stream)))
    held = [jnp.asarray(a if columns_inner else a.T.copy()) for a in w]
    got = [np.asarray(f(x, *held)[0]) for _ in range(3)]
    assert error(got[0], programs.decoder_reference(x, w)) < 3e-3
    assert all((g == got[0]).all() for g in got), "launches differ"


@pytest.mark.parametrize("batch,slices", [(1, 4), (16, 2), (5, 1)])
def test_split_over_depth(batch, slices):
    d, ff, layers = 512, 1024, 3
    x, w = operands(batch, d, ff, layers, ml_dtypes.bfloat16)
    blob = programs.split_chain(batch, d, ff, layers, slices)
    f = jax.jit(launch.function(blob, [((batch, d), jnp.float32)], launch.device()))
    assert error(np.asarray(f(x, *map(jnp.asarray, w))[0]), programs.decoder_reference(x, w)) < 3e-3


def test_rows_do_not_depend_on_their_neighbours():
    d, ff, layers = 512, 1024, 2
    x, w = operands(16, d, ff, layers, ml_dtypes.bfloat16)
    run = {}
    for batch in (1, 5, 16):
        blob = programs.decoder_step(batch, d, ff, layers)
        f = launch.function(blob, [((batch, d), jnp.float32)], launch.device())
        run[batch] = np.asarray(jax.jit(f)(x[:batch], *map(jnp.asarray, w))[0])
    assert (run[1][0] == run[16][0]).all() and (run[5] == run[16][:5]).all()


@pytest.mark.parametrize("columns_inner", [True, False])
def test_f32(columns_inner):
    batch, d, ff, layers = 2, 384, 640, 2
    x, w = operands(batch, d, ff, layers, np.float32)
    blob = programs.decoder_step(batch, d, ff, layers, columns_inner=columns_inner, dtype="F32", stream=False)
    f = jax.jit(launch.function(blob, [((batch, d), jnp.float32)], launch.device()))
    got = np.asarray(f(x, *[jnp.asarray(a if columns_inner else a.T.copy()) for a in w])[0])
    assert error(got, programs.decoder_reference(x, w, round_=False)) < 1e-5


def test_ragged_depth():
    """k that is no multiple of a frame, columns that are no multiple of a tile."""
    batch, d, ff = 2, 200, 328
    x, w = operands(batch, d, ff, 1, ml_dtypes.bfloat16)
    blob = programs.decoder_step(batch, d, ff, 1)
    f = jax.jit(launch.function(blob, [((batch, d), jnp.float32)], launch.device()))
    assert error(np.asarray(f(x, *map(jnp.asarray, w))[0]), programs.decoder_reference(x, w)) < 3e-3


def test_a_stuck_launch_ends_and_the_next_one_works():
    batch, d, ff = 1, 512, 1024
    x, w = operands(batch, d, ff, 1, ml_dtypes.bfloat16)
    held = [jnp.asarray(x), *map(jnp.asarray, w)]
    stuck = programs.decoder_step(batch, d, ff, 1, lose_event=True)
    f = jax.jit(launch.function(stuck, [((batch, d), jnp.float32)], launch.device(), deadline_ms=50))
    jax.block_until_ready(f(*held))
    text = launch.extension().cuda_check()
    assert "down0" in text and "event 0" in text and "gave up" in text
    jax.block_until_ready(f(*held))  # gives up again: the counters were cleared, and nothing hangs
    with pytest.raises(Exception, match="down0"):
        jax.block_until_ready(f(*held))
    good = jax.jit(
        launch.function(programs.decoder_step(batch, d, ff, 1), [((batch, d), jnp.float32)], launch.device())
    )
    assert error(np.asarray(good(*held)[0]), programs.decoder_reference(x, w)) < 3e-3


def test_many_launches_in_a_loop_and_in_command_buffers():
    batch, d, ff = 1, 512, 1024
    x, w = operands(batch, d, ff, 1, ml_dtypes.bfloat16)
    held = list(map(jnp.asarray, w))
    run = launch.function(programs.decoder_step(batch, d, ff, 1), [((batch, d), jnp.float32)], launch.device())
    want = jnp.asarray(x)
    one = jax.jit(run)
    for _ in range(20):
        want = one(want, *held)[0] * 0.5
    looped = jax.jit(lambda x, *w: jax.lax.fori_loop(0, 20, lambda _, v: run(v, *w)[0] * 0.5, x))
    for _ in range(5):
        got = looped(jnp.asarray(x), *held)
    assert (np.asarray(got) == np.asarray(want)).all()
