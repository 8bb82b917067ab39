"""Streams are even: no worker gets much more of an operator's weights than the mean, whatever the operator's shape."""

from __future__ import annotations

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import compiler
from jax_mpk.device import H100, Device
from jax_mpk.ir.graph import Contract
from jax_mpk.kinds.contract.even import busiest, widths
from jax_mpk.options import Options
from jax_mpk.passes.hops import levels
from tests import emulator
from tests.execute import Runner

BF16 = jnp.bfloat16


def test_widths():
    assert widths((8192, 8192), 1, 132, 64, 2048) == (64, 64), "128 tasks each, two a worker"
    assert widths((12288, 12288), 1, 132, 64, 2048) == (64, 64), "96 wide tasks each are two turns, 384 three halves"
    assert widths((12288,), 1, 132, 64, 2048) == (128,)
    assert widths((5120,), 4, 78, 64, 2048) == (320,), "64 tasks for 78 workers rather than 80"
    assert busiest((12288, 12288), (64, 64), 1, 132) == 192 and busiest((12288, 12288), (128, 128), 1, 132) == 256


def gated(x, gate, up, down):
    h = jnp.tanh(x)
    return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down


def fused(x, both, down):
    a, b = jnp.split(jnp.tanh(x) @ both, 2, -1)
    return x + (jax.nn.silu(a) * b) @ down


def operands(f, rows: int, width: int, hidden: int) -> list[jax.ShapeDtypeStruct]:
    first = [(width, hidden)] * 2 if f is gated else [(width, 2 * hidden)]
    return [jax.ShapeDtypeStruct(s, BF16) for s in ((rows, width), *first, (hidden, width))]


def compiled(f, target: Device, *shape: int) -> compiler.Compiled:
    closed = jax.make_jaxpr(f)(*operands(f, *shape))
    return compiler.compile(closed, target, Options(cache_entries=0))


# A worker streams 1.2 times as fast while others do not, so this is near to even (docs/measurements.md, run 32).
@pytest.mark.parametrize(("workers", "limit"), [(132, 1.38), (114, 1.45), (78, 1.65)])
@pytest.mark.parametrize(
    "shape", [(2048, 8192), (1024, 3072), (2048, 6144), (4096, 12288), (3072, 8192), (5120, 13824)]
)
@pytest.mark.parametrize("f", [gated, fused])
def test_a_gated_network(f, shape, workers, limit):
    tg = compiled(f, replace(H100, workers=workers, tasks=workers), 1, *shape).stages["memory"]
    frames = np.bincount(tg.streams.task, tg.streams.frames, tg.tasks)
    level = levels(tg)
    for n in np.unique(level[frames > 0]):
        here = (level == n) & (frames > 0)
        load = np.bincount(tg.worker[here], frames[here], workers)
        assert load.max() <= limit * load.mean(), f"level {n}: {load.max()} of {load.mean():.1f}"


def test_parts_that_would_be_read_too_often_stay_together():
    """At 8 rows the readers of the parts would read more than the frames that are saved."""
    contractions = lambda rows, *shape: [  # noqa: E731
        len(op.rhs) for op in compiled(gated, H100, rows, *shape).stages["refine"].ops if isinstance(op, Contract)
    ]
    assert contractions(1, 4096, 12288) == [1, 1, 1]
    assert contractions(8, 4096, 12288) == [2, 1]
    assert contractions(1, 2048, 8192) == [2, 1], "128 tasks of both are even"


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.parametrize("rounded", [True, False])
def test_parts_on_the_emulator(rounded, rows=1):
    """Taken apart, without slices: what is rounded first is kept as bf16, the rest in f32. Poisoned memory."""

    def f(x, gate, up, down):
        a, b = (jnp.matmul(jnp.tanh(x), w, preferred_element_type=BF16 if rounded else jnp.float32) for w in (gate, up))
        return (jax.nn.silu(a) * b).astype(BF16) @ down

    target = replace(H100, workers=4, tasks=4)
    rng = np.random.default_rng(rows)
    args = [
        jnp.asarray(rng.standard_normal(a.shape) * a.shape[0] ** -0.5, BF16) for a in operands(gated, rows, 256, 384)
    ]
    run = Runner(f, *args, target=target)
    parts = [op for op in run.compiled.stages["refine"].ops if isinstance(op, Contract)][:2]
    kept = {run.compiled.stages["refine"].values[op.out].dtype for op in parts}
    assert [len(op.rhs) for op in parts] == [1, 1] and kept == {"bf16" if rounded else "f32"}
    (got,) = emulator.Site(run.blob).run(run, seed=1)
    want = np.asarray(jax.jit(f)(*args), np.float32)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 3072), (2048, 8192), (640, 1408)])
@pytest.mark.parametrize("f", [gated, fused])
def test_slices_do_not_depend_on_the_rows(f, shape):
    """A row's sums have one order, so its bits are those of the row alone."""

    def depths(rows: int) -> list[int]:
        g = compiled(f, H100, rows, *shape).stages["fuse"]
        return [op.k[0][1] for op in g.ops if isinstance(op, Contract) for _ in op.rhs]

    alone = depths(1)
    assert min(alone) < max(shape), "something is sliced"
    assert {rows: depths(rows) for rows in (2, 3, 5, 8, 16, 33)} == dict.fromkeys((2, 3, 5, 8, 16, 33), alone)
