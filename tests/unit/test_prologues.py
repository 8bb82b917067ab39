"""Contractions of one left operand: equal slices, prologues computed once a worker, and no worker with more than its part."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import abi, compiler
from jax_mpk.device import CPU, H100, Device
from jax_mpk.ir.graph import Contract
from jax_mpk.options import Options
from jax_mpk.passes import placement, split
from tests import emulator, execute

BF16 = jnp.bfloat16


def _norm(x, w):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * w


def layers(x, *weights):
    """Layers of one width: norm; three contractions of it; one of what they make."""
    for n in range(0, len(weights), 5):
        w, q, k, v, o = weights[n : n + 5]
        h = _norm(x, w)
        x = x + jnp.concatenate([jnp.tanh(h @ q), h @ k, h @ v], -1) @ o
    return x


def operands(width: int, q: int, kv: int, depth: int, rows: int = 1, dtype=BF16) -> list[jax.ShapeDtypeStruct]:
    shapes = [(rows, width), *[(width,), (width, q), (width, kv), (width, kv), (q + 2 * kv, width)] * depth]
    return [jax.ShapeDtypeStruct(s, dtype) for s in shapes]


def compiled(*shapes: int) -> compiler.Compiled:
    closed = jax.make_jaxpr(layers)(*operands(*shapes))
    return compiler.compile(closed, H100, Options(cache_entries=0))


# width of the input, columns of Q, of K and V -> slices
SHAPES = {
    (2048, 2048, 512): 8,
    (1024, 2048, 1024): 2,
    (2048, 2048, 1024): 2,
    (4096, 4096, 1024): 4,
    (2048, 9000, 64): 8,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_slices(shape):
    width, q, kv = shape
    graph = compiled(*shape, 1).stages["refine"]
    three = [op for op in graph.ops if isinstance(op, Contract)][:3]
    assert len({op.k for op in three}) == 1
    slices = width // three[0].k[0][1]
    assert slices == SHAPES[shape]
    loads = {s: split._load(width, (q, kv, kv), s, H100) for s in range(1, 9) if width % (128 * s) == 0}
    assert loads[slices] <= min(n for s, n in loads.items() if s <= slices)
    if len(three[0].domain) == len(three[1].domain):
        assert three[0].lhs is three[1].lhs is three[2].lhs


@pytest.mark.parametrize("shape", [(2048, 2048, 512), (2048, 2048, 1024), (4096, 4096, 1024)])
@pytest.mark.parametrize("rows", [1, 8])
def test_numbers_of_prologues_are_those_of_the_program(shape, rows):
    c = compiled(*shape, 2, rows)
    tg, program = c.stages["memory"], abi.decode(c.program)
    number = placement._prologues(tg)
    tile = {}
    for task in range(tg.tasks):
        op = program["Op"][tg.grid_of[task]]
        n = int(op["params"][abi.enum("Param", "N_BATCH")]) + int(op["params"][abi.enum("Param", "N_M")])
        grid = tg.grids[tg.grid_of[task]]
        parts = [-(-e // t) for e, t in zip(grid.extent, grid.tile, strict=True)]
        of = int(op["prologue"]), tuple(int(x) for x in np.unravel_index(tg.index[task], parts)[:n])
        assert (number[task] < 0) == (not of[0])
        if of[0]:
            assert tile.setdefault(number[task], of) == of, "one number, two activations"
    assert len(set(tile.values())) == len(tile), "one activation, two numbers"


def test_prologues_are_shared_and_work_is_even():
    c = compiled(2048, 2048, 512, 6)
    tg = c.stages["memory"]
    number, shared, held = placement._prologues(tg), 0, {}
    for task in tg.order[number[tg.order] >= 0]:
        shared += held.get(tg.worker[task]) == number[task]
        held[tg.worker[task]] = number[task]
    assert shared > 0.8 * 6 * 128, "K and V are not where Q of the same slice is"
    frames = np.bincount(tg.worker[tg.streams.task], tg.streams.frames, H100.workers)
    assert frames.max() <= 1.05 * frames.mean()


@pytest.mark.parametrize("shape", [(1024, 2048, 1024), (2048, 2048, 1024), (2304, 2048, 1024)])
def test_tasks_of_a_level_go_to_different_workers(shape):
    tg = compiled(*shape, 6).stages["memory"]
    first = [n for n, g in enumerate(tg.grids) if g.kind == "contract"]
    for n in range(0, len(first), 4):  # Q, K and V: 128 tasks, 132 workers
        tasks = np.isin(tg.grid_of, first[n : n + 3])
        assert np.bincount(tg.worker[tasks]).max() == 1
    frames = np.bincount(tg.worker[tg.streams.task], tg.streams.frames, H100.workers)
    assert frames.max() <= frames.mean() + np.bincount(tg.streams.task, tg.streams.frames).max(), (
        "remainders do not rotate"
    )


@pytest.mark.parametrize("columns", [40000, 128256, 151936])
def test_no_worker_takes_a_turn_more_than_the_others_need(columns):
    def step(x, head, *weights):
        return layers(x, *weights) @ head

    x, *weights = operands(2048, 2048, 512, 3, 8)
    closed = jax.make_jaxpr(step)(x, jax.ShapeDtypeStruct((2048, columns), BF16), *weights)
    tg = compiler.compile(closed, H100, Options(cache_entries=0)).stages["memory"]
    tasks = tg.grid_of == max(n for n, g in enumerate(tg.grids) if g.kind == "contract")
    assert tasks.sum() > H100.workers
    assert np.bincount(tg.worker[tasks]).max() == -(-tasks.sum() // H100.workers)


def shared(target: Device) -> tuple[execute.Runner, np.ndarray]:
    """A program in which Q, K and V of each layer have one prologue, and what it should give."""
    r = np.random.default_rng(3)
    args = [
        r.normal(size=s.shape, scale=s.shape[0] ** -0.5).astype(np.float32)
        for s in operands(256, 256, 256, 2, 3, np.float32)
    ]
    run = execute.Runner(layers, *args, target=target)
    numbers = abi.decode(run.blob)["Op"]["prologue"]
    assert [n for n in Counter(numbers[numbers > 0].tolist()).values() if n > 1] == [3, 3]
    return run, jax.jit(layers)(*args)


@pytest.mark.parametrize("threads", [1, 3])
def test_shared_prologues_on_the_executor(threads):
    run, want = shared(CPU)
    np.testing.assert_allclose(run(threads=threads)[0], want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(run(threads=threads)[0], run(seed=5)[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
def test_shared_prologues_on_the_emulator():
    run, want = shared(replace(H100, workers=4))
    site = emulator.Site(run.blob)
    first, again = (site.run(run, seed=seed)[0] for seed in (0, 1))
    np.testing.assert_allclose(first, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(first, again)
