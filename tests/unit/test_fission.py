"""Pass `fission`: columns with separate readers are separate contractions, so that fused matrices cost nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decoders as S
from jax_mpk import compiler, device
from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Attention, Contract, Graph, check
from jax_mpk.options import Options
from jax_mpk.passes import fission, simplify
from jax_mpk.passes.hops import hops
from tests.execute import Runner
from tests.functions import data
from tests.unit.lowering import graph_of

SHAPE = S.Shape(layers=2, width=128, heads=4, kv_heads=2, head=32, hidden=256, vocab=128)


def taken(f, *args) -> Graph:
    """The graph after the pass, which computes the same."""
    before = simplify.run(graph_of(f, *args))
    after = check(fission.run(before))
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    for x, y in zip(interpret.run(after, flat), interpret.run(before, flat), strict=True):
        np.testing.assert_array_equal(x, y)
    return after


def columns(g: Graph) -> list[int]:
    return [op.domain[-1] for op in g.ops if isinstance(op, Contract)]


def test_slices():
    g = taken(lambda x, w: tuple(jnp.tanh(y) for y in jnp.split(x @ w, [64, 96], 1)), data(3, 16), data(16, 160))
    assert columns(g) == [64, 32, 64]


def test_gate_and_up():
    def f(x, w):
        g, u = jnp.split(x @ w, 2, 1)
        return jax.nn.silu(g) * u

    assert columns(taken(f, data(3, 16), data(16, 128))) == [64, 64]
    g = taken(
        lambda x, w: (lambda h: jax.nn.silu(h[:, 0]) * h[:, 1])(jnp.einsum("bd,dcf->bcf", x, w)),
        data(3, 16),
        data(16, 2, 64),
    )
    assert [op.domain for op in g.ops if isinstance(op, Contract)] == [(3, 1, 64)] * 2


def test_columns_that_nobody_reads():
    assert columns(taken(lambda x, w: (x @ w)[:, :100] + 1, data(3, 16), data(16, 128))) == [100]


def test_a_bias_follows_its_columns():
    def f(x, w, b):
        a, c = jnp.split(x @ w + b, 2, 1)
        return a * 2, c + 1

    assert columns(taken(f, data(3, 16), data(16, 128), data(128))) == [128]  # the sum has readers, not the product
    g = compiler.compile(jax.make_jaxpr(f)(data(3, 16), data(16, 128), data(128)), device.CPU, Options(cache_entries=0))
    assert g.stages["fission"]


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: (lambda y: (y, y[:, :64] * 2, y[:, 64:] + 1))(x @ w),  # the whole is a result
        lambda x, w: (lambda y: (y[:, :80] * 2, y[:, 48:] + 1))(x @ w),  # slices that overlap
        lambda x, w: (lambda y: (y[:, ::2] * 2, y[:, 1::2] + 1))(x @ w),  # every other column
        lambda x, w: tuple((x @ w)[:, 8 * n : 8 * n + 8] + n for n in range(16)),  # too many and too small
        lambda x, w: (lambda y: y[:, :64] + y.sum(1, keepdims=True))(x @ w),  # a reader of everything
    ],
)
def test_what_stays_whole(f):
    assert columns(taken(f, data(3, 16), data(16, 128)))[:1] == [128]


def test_a_place_known_at_run_time_stays_whole():
    g = taken(
        lambda x, w, i: jax.lax.dynamic_slice(x @ w, (0, i), (3, 40)) * 2, data(3, 16), data(16, 128), np.int32(3)
    )
    assert columns(g) == [128]


@pytest.mark.parametrize("target", [device.CPU, device.H100], ids=["cpu", "cuda"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layout", S.LAYOUTS)
def test_every_layout_of_weights_and_caches_is_one_program(layout, batch, target):
    """The same operators in the same hops as with a matrix each, a cache each, and rows of K."""

    def operators(how: str) -> list[tuple]:
        f, args = S.laid_out(SHAPE, batch, jnp.bfloat16, S.LAYOUTS[how])
        out = compiler.compile(jax.make_jaxpr(f)(*args), target, Options(cache_entries=0))
        g = out.stages["refine"]
        assert all(len(op.appends) == 2 and op.limit is not None for op in g.ops if isinstance(op, Attention))
        assert max(hops(g)) + 1 == 5 * SHAPE.layers + 2
        # How a CPU cuts a matrix depends on which way it lies; everything else is the same.
        kinds = ("attention", "sort", "update") if target.rows else ("attention", "contract", "map", "sort", "update")
        return [(op.kind, math.prod(op.domain)) for op in g.ops if op.kind in kinds]

    assert sorted(operators(layout)) == sorted(operators("plain"))


@pytest.mark.parametrize("layout", S.LAYOUTS)
def test_every_layout_computes_the_same(layout):
    f, args = S.laid_out(SHAPE, 2, jnp.float32, S.LAYOUTS[layout], norm="divide")
    want = [np.asarray(x) for x in jax.tree.leaves(jax.jit(f)(*args))]
    for x, y in zip(Runner(f, *args)(seed=3), want, strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=1e-4, atol=1e-4)
