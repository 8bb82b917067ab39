"""Fusion: five hops a decoder layer, whatever the spelling, and the same values before and after every pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax

from benchmarks import decoders as S
from jax_mpk import device
from jax_mpk.frontend import lower
from jax_mpk.ir import expr as E
from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Attention, Contract, Graph, Map, Scan
from jax_mpk.passes import fuse, layout, recognise, simplify
from jax_mpk.passes.hops import hops
from models import decode, registry
from tests import functions

PASSES = {"simplify": simplify.run, "recognise": recognise.run, "fuse": fuse.run, "layout": layout.run}


def stages(f, *args, target: device.Device = device.CPU) -> dict[str, Graph]:
    """The graph after every pass, `lower` first."""
    g = lower(jax.make_jaxpr(f)(*args))
    out = {"lower": g}
    for name, run in PASSES.items():
        out[name] = g = run(g, target) if name == "fuse" else run(g)
    return out


def levels(g: Graph) -> int:
    return max(hops(g)) + 1


SHAPE = S.Shape(layers=3)
CASES = [dict(norm=n) for n in S.NORMS] + [dict(rope=r) for r in S.ROPES] + [dict(update=u) for u in S.UPDATES] \
    + [dict(attend=a) for a in S.ATTENTIONS]  # fmt: skip


def _arguments(shape: S.Shape, batch: int, dtype):
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, shape.vocab, batch), jnp.int32)
    return S.weights(shape, dtype), tokens, S.cache(shape, batch, dtype), jnp.int32(7)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(next(iter(c.items()))))
def test_five_hops_a_layer_in_every_spelling(case, qk_norm):
    shape = S.Shape(layers=3, qk_norm=qk_norm)
    g = stages(S.decoder(shape, **case), *_arguments(shape, 2, jnp.bfloat16))["layout"]
    assert levels(g) == 5 * shape.layers + 2, str(g)  # and the head, and the argmax
    assert sum(isinstance(op, Attention) for op in g.ops) == shape.layers
    assert all(len(op.appends) == 2 for op in g.ops if isinstance(op, Attention))
    assert all(op.limit is not None for op in g.ops if isinstance(op, Attention))
    assert sum(isinstance(op, Contract) for op in g.ops) == 6 * shape.layers + 1  # gate and up are one


@pytest.mark.parametrize("name", ["qwen3-tiny", "llama-tiny"])
@pytest.mark.parametrize("target", [device.CPU, device.H100], ids=["cpu", "cuda"])
def test_five_hops_a_layer_in_the_zoo(name, target):
    model, config = registry.load(name, dtype=jnp.bfloat16, seed=0)
    graphdef, state = nnx.split(model)
    step = lambda s, t, c, p: decode.greedy_step(graphdef, s, t, c, p)  # noqa: E731
    g = stages(step, state, jnp.zeros(2, jnp.int32), model.init_cache(2, 32), jnp.int32(3), target=target)["layout"]
    assert levels(g) == 5 * config.num_layers + 2, str(g)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(next(iter(c.items()))))
def test_passes_keep_the_values(case):
    shape = S.Shape(layers=1, qk_norm=True)
    f = S.decoder(shape, **case)
    args = _arguments(shape, 3, jnp.float32)
    want = [np.asarray(x) for x in jax.tree.leaves(jax.jit(f)(*args))]
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    for name, g in stages(f, *args).items():
        got = interpret.run(g, [x.copy() for x in flat])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


def test_split_k_keeps_the_values_and_the_hops():
    shape = S.Shape(layers=2, width=256, hidden=512)
    f = S.decoder(shape)
    args = _arguments(shape, 2, jnp.float32)
    g = stages(f, *args, target=device.H100)["layout"]
    assert levels(g) == 5 * shape.layers + 2
    assert any(len(op.domain) == 4 for op in g.ops if isinstance(op, Contract)), "nothing was split"
    got = interpret.run(g, [np.array(x) for x in jax.tree.leaves(args)])
    for a, b in zip(got, jax.tree.leaves(jax.jit(f)(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", functions.NO_DECODERS)
def test_functions_that_are_no_decoder(name):
    f, args = functions.no_decoder(name, 3, np.float32)
    want = jax.tree.leaves(jax.jit(f)(*args))
    for stage, g in stages(f, *args).items():
        got = interpret.run(g, [np.array(x) for x in args])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5, err_msg=stage)
    if name == "attention":
        assert any(isinstance(op, Attention) for op in g.ops)
    if name == "mlp":
        assert levels(g) == 2, str(g)


def test_bf16_rounds_where_the_function_rounds():
    """Fusing does not change a bit: the fused map equals the equations one by one."""
    f = lambda x, y: (x * y + x) / (jnp.abs(y) + x * 0.5)  # noqa: E731
    rng = np.random.default_rng(3)
    args = [rng.normal(size=(9, 17)).astype(ml_dtypes.bfloat16) for _ in range(2)]
    all_stages = stages(f, *args)
    want = interpret.run(all_stages["lower"], args)[0]
    got = interpret.run(all_stages["layout"], args)[0]
    assert len(all_stages["layout"].ops) == 1
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def test_logits_are_written_once_and_equal_contractions_are_one():
    shape = S.Shape(layers=1)
    g = stages(S.decoder(shape), *_arguments(shape, 2, jnp.bfloat16))["layout"]
    assert g.ops[-1].reads() == {g.results[1]}, "the argmax reads the logits that are returned"
    f = lambda x, w: jnp.tanh(x @ w) * (x @ w)  # noqa: E731
    args = functions.data(4, 20), functions.data(20, 12)
    g = stages(f, *args)["layout"]
    assert len(g.ops) == 1 and len(g.ops[0].rhs) == 1
    np.testing.assert_allclose(interpret.run(g, args)[0], jax.jit(f)(*args), rtol=2e-5, atol=2e-5)


def test_a_scan_takes_what_is_before_and_behind_it():
    x = jnp.ones((4, 300))
    g = stages(lambda x: (jnp.tanh(jnp.cumsum(jax.nn.softmax(x), -1)) * 2 + x).astype(jnp.bfloat16), x)["layout"]
    assert [type(op) for op in g.ops] == [Scan], str(g)
    g = stages(lambda x: jnp.sin(lax.cummax(jnp.exp(x), 0, reverse=True)).reshape(200, 6), jnp.ones((100, 12)))[
        "layout"
    ]
    assert [type(op) for op in g.ops] == [Scan], str(g)


def test_a_core_of_rows_does_not_repeat_what_all_rows_share():
    """It evaluates its prologue for every row: the sum of everything would be summed as often."""
    x = jnp.ones((500, 200))
    for f in (lambda x: jnp.cumsum(x / jnp.sum(x), 1), lambda x: jnp.sort(x / jnp.sum(x), 1),
              lambda x: jnp.cumsum(x, 1) / jnp.sum(jnp.sin(x))):  # fmt: skip
        g = stages(f, x)["layout"]
        assert sorted(isinstance(op, Map) for op in g.ops) == [False, True], str(g)


def test_equal_cores_of_any_kind_are_one():
    x = jnp.ones((3, 200))
    g = stages(lambda x: (jnp.sort(x), jnp.sort(x) * 2, jnp.cumsum(x, 1), 3 - jnp.cumsum(x, 1)), x)["simplify"]
    assert sorted(op.kind for op in g.ops if op.kind != "map") == ["scan", "sort"], str(g)


def _sums_in_a_product(state, x, k):
    y = jnp.sum(x * k, 0)
    n = state.shape[0]
    return state + y[:n, None] * y[n:]


def _norm_of_sums(state, c):
    y = jnp.sum(state * c, -1)
    return y * jax.lax.rsqrt(jnp.mean(y * y) + 1e-5)


@pytest.mark.parametrize(
    ("f", "shapes"), [(_sums_in_a_product, ((48, 32), (4, 80), (4, 80))), (_norm_of_sums, ((64, 32), (32,)))]
)
@pytest.mark.parametrize("target", [device.CPU, device.H100])
def test_nothing_is_reduced_again_for_every_element(f, shapes, target):
    """What a map reduces is computed once where another would need it for each point of an axis that it does not have."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    g = stages(f, *args, target=target)["layout"]
    first, last = g.ops
    assert isinstance(first, Map) and isinstance(last, Map)
    deep = [x for e in last.exprs().values() for x in E.walk(e) if isinstance(x, E.Reduce)]
    assert first.expr.height == 1 and len(deep) == (f is _norm_of_sums)
    assert last.reads() & set(first.writes()) and not last.reads() & set(g.args[1:])


@pytest.mark.parametrize("rows,streamed", [(1, "chosen"), (3, "chosen"), (64, "given")])
def test_a_matrix_that_an_index_chooses_is_what_is_streamed(rows, streamed):
    """Beside few rows: as the activation it would be read element by element. Rows that an index chooses are activations."""
    x, w = jax.ShapeDtypeStruct((rows, 64), jnp.float32), jax.ShapeDtypeStruct((4, 64, 96), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    g = stages(lambda x, w, s: x @ w[s], x, w, index)["layout"]
    (op,) = (o for o in g.ops if isinstance(o, Contract))
    given = {v for r in op.rhs for v in r.loads} == {g.args[0]}
    assert given == (streamed == "given")
    table, tokens = jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    g = stages(lambda t, i, w: t[i] @ w, table, tokens, jax.ShapeDtypeStruct((64, 96), jnp.float32))["layout"]
    (op,) = (o for o in g.ops if isinstance(o, Contract))
    assert {v for r in op.rhs for v in r.loads} == {g.args[2]}


def _outer(state, x, k):
    return state * jax.nn.gelu(x)[:, None] + jax.nn.gelu(jnp.tanh(k))


def _outer_sum(state, x, k):
    return (state * jax.nn.gelu(x)[:, None] * jax.nn.gelu(jnp.tanh(k))).sum(-1)


@pytest.mark.parametrize("f", [_outer, _outer_sum])
def test_nothing_costly_is_computed_again_for_every_row(f):
    """What goes by the inner axis is a map of its own if the rows are many; what goes by the outer one costs nothing there."""
    shapes = lambda rows: [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, 256), (rows,), (256,))]
    g = stages(f, *shapes(512))["layout"]
    first, last = g.ops
    assert first.domain == (256,) and first.reads() == {g.args[2]} and last.reads() == {*g.args[:2], first.out}
    assert len(stages(f, *shapes(8))["layout"].ops) == 1, "a hop costs more"
