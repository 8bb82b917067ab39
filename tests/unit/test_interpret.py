"""The interpreter on graphs as passes make them: cores, appends, stores, dynamic coordinates, its own checks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_mpk.ir import expr as E
from jax_mpk.ir import interpret, scalar
from jax_mpk.ir.expr import Coord
from jax_mpk.ir.graph import (
    APPEND_AXIS,
    HEAD_AXIS,
    KEY_AXIS,
    Append,
    Attention,
    Contract,
    Graph,
    GraphError,
    Map,
    Sort,
    Update,
    Value,
    check,
)
from tests.unit.lowering import graph_of, normal

RNG = np.random.default_rng(0)


def axis(a, n):
    return E.coord_axis(a, n)


def graph(shapes, ops, results, dtypes=None):
    """A graph whose values 0, 1, ... have these shapes; those that no operator writes are arguments."""
    written = {v for op in ops for v in op.writes()}
    values = {}
    for i, shape in enumerate(shapes):
        dtype = (dtypes or {}).get(i, "f32")
        index = sum(j not in written for j in range(i))
        values[i] = Value(i, shape, dtype) if i in written else Value(i, shape, dtype, "arg", index)
    args = tuple(i for i in values if i not in written)
    return check(Graph(values, tuple(ops), args, tuple(results)))


def f32(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_contract_with_two_right_hand_sides():
    """out = silu(acc1) * acc0, the rows normalised in the prologue."""
    x, w0, w1 = f32(3, 8), f32(8, 5), f32(8, 5)
    k, i, j = axis(E.CORE_AXIS, 8), axis(0, 3), axis(1, 5)
    row = E.reduce("max", E.load(0, (i, axis(90, 8)), "f32"), (90,), (8,))
    op = Contract(3, (3, 5), lhs=E.binary("sub", E.load(0, (i, k), "f32"), row),
                  rhs=(E.load(1, (k, j), "f32"), E.load(2, (k, j), "f32")), k=((E.CORE_AXIS, 8),),
                  epilogue=E.binary("mul", E.unary("logistic", E.acc(1, (0, 1))), E.acc(0, (0, 1))))  # fmt: skip
    (out,) = interpret.run(graph([(3, 8), (8, 5), (8, 5), (3, 5)], [op], [3]), [x, w0, w1])
    n = x - x.max(1, keepdims=True)
    np.testing.assert_allclose(out, 1 / (1 + np.exp(-(n @ w1))) * (n @ w0), rtol=2e-5)


def test_contract_with_broadcast_axes():
    """A contracted axis that one side does not use, a domain axis that neither uses, and integers."""
    x, w = f32(3), f32(4, 5)
    k = ((E.CORE_AXIS, 4),)
    op = Contract(2, (2, 3, 5), lhs=E.load(0, (axis(1, 3),), "f32"), rhs=(E.load(1, (axis(32, 4), axis(2, 5)), "f32"),),
                  k=k, epilogue=E.acc(0, (1, 2)))  # fmt: skip
    (out,) = interpret.run(graph([(3,), (4, 5), (2, 3, 5)], [op], [2]), [x, w])
    np.testing.assert_allclose(out, np.broadcast_to(x[:, None] * w.sum(0), (2, 3, 5)), rtol=1e-5)


def attention(limit, appends):
    b, g, r, s, d, dv = 2, 2, 3, 7, 4, 5
    shapes = [(b, g, r, d), (b, s, g, d), (b, s, g, dv), (b, g, dv), (b,), (b, g, r, dv), (b, s, g, dv)]
    B, G, R, C = axis(0, b), axis(1, g), axis(2, r), axis(3, dv)
    H, K = axis(HEAD_AXIS, d), axis(KEY_AXIS, s)
    pos = E.load(4, (B,), "i32")
    append = Append(2, 6, (1, b, g, dv), (APPEND_AXIS, 0, 1, APPEND_AXIS + 1),
                    E.load(3, (B, G, axis(APPEND_AXIS + 1, dv)), "f32"),
                    (B, Coord(0, (), pos, s - 1), G, axis(APPEND_AXIS + 1, dv)))  # fmt: skip
    op = Attention(
        5, (b, g, r, dv), batch=(0, 1), rows=(2,), column=3, keys=s, head=d,
        q=E.load(0, (B, G, R, H), "f32"), k=E.load(1, (B, K, G, H), "f32"),
        v=E.load(6 if appends else 2, (B, K, G, C), "f32"),
        score=E.binary("mul", E.acc(0, (0, 1, 2, KEY_AXIS)), E.const(0.5, "f32")), prob=E.acc(0, (0, 1, 2, KEY_AXIS)),
        epilogue=E.unary("neg", E.acc(0, (0, 1, 2, 3))),
        limit=E.binary("add", pos, E.const(1, "i32")) if limit else None, appends=(append,) if appends else (),
    )  # fmt: skip
    if not appends:
        shapes.pop()
    return graph(shapes, [op], [5, 6] if appends else [5], {4: "i32"})


@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize("appends", [False, True])
def test_attention(limit, appends):
    q, k, v, new = f32(2, 2, 3, 4), f32(2, 7, 2, 4), f32(2, 7, 2, 5), f32(2, 2, 5)
    pos = np.int32([2, 6])
    out = interpret.run(attention(limit, appends), [q, k, v, new, pos])
    cache = v.copy()
    if appends:
        cache[[0, 1], pos] = new
        np.testing.assert_array_equal(out[1], cache)
    s = jnp.einsum("bgrd,bsgd->bgrs", q, k) * 0.5
    if limit:
        s = jnp.where(jnp.arange(7) <= pos[:, None, None, None], s, -jnp.inf)
    want = -jnp.einsum("bgrs,bsgc->bgrc", jax.nn.softmax(s), cache)
    np.testing.assert_allclose(out[0], want, rtol=1e-5, atol=1e-6)


def test_store_maps_and_poison():
    """A transposed store; elements that nobody writes are NaN."""
    e = E.load(0, (axis(0, 3), axis(1, 2)), "f32")
    x = f32(3, 2)
    g = graph([(3, 2), (2, 3)], [Map(1, (3, 2), store=(axis(1, 2), axis(0, 3)), expr=e)], [1])
    np.testing.assert_array_equal(interpret.run(g, [x])[0], x.T)
    g = graph([(3, 2), (4, 3)], [Map(1, (3, 2), store=(axis(1, 2), axis(0, 3)), expr=e)], [1])
    assert np.isnan(interpret.run(g, [x])[0][2:]).all()


def test_sort_keeps_ties_in_order():
    key = np.int32([[3, 1, 3, 1, 2]])
    for descending, want in ((False, [1, 3, 4, 0, 2]), (True, [0, 2, 4, 1, 3])):
        op = Sort(1, (1, 5), key=E.load(0, (axis(0, 1), axis(1, 5)), "i32"), payload="indices", descending=descending,
                  count=5)  # fmt: skip
        g = graph([(1, 5), (1, 5)], [op], [1], {0: "i32", 1: "i32"})
        np.testing.assert_array_equal(interpret.run(g, [key])[0][0], want)


def update(mode, oob, limit=4, dtype="f32"):
    at = Coord(0, (), E.load(1, (axis(0, 3),), "i32"), limit)
    e = E.load(2, (axis(0, 3),), "f32")
    op = Update(3, (3,), append=Append(0, 3, (3,), (0,), e, (at,), mode, oob))
    return graph([(5,), (3,), (3,), (5,)], [op], [3], {1: "i32", 0: dtype, 3: dtype})


def test_updates():
    x, u = np.arange(5, dtype=np.float32), np.float32([10, 20, 30])
    at = np.int32([-1, 1, 7])
    for mode, oob, want in (("set", "drop", [0, 20, 2, 3, 4]), ("set", "clamp", [10, 20, 2, 3, 30]),
                            ("add", "drop", [0, 21, 2, 3, 4])):  # fmt: skip
        np.testing.assert_array_equal(interpret.run(update(mode, oob), [x, at, u])[0], want)
    (out,) = interpret.run(update("add", "drop"), [x, np.int32([1, 1, 1]), u])
    np.testing.assert_array_equal(out, [0, 61, 2, 3, 4])
    b = np.full(5, 256, ml_dtypes.bfloat16)  # each addition rounds: 256 + 1 is 256
    (out,) = interpret.run(update("add", "drop", dtype="bf16"), [b, np.int32([1, 1, 1]), np.ones(3, np.float32)])
    assert out[1] == 256
    np.testing.assert_array_equal(x, np.arange(5))


def test_it_notices_mistakes():
    g = update("set", "drop")
    with pytest.raises(GraphError, match="3 arguments expected"):
        interpret.run(g, [])
    with pytest.raises(GraphError, match="does not fit"):
        interpret.run(g, [np.zeros(5), np.zeros(3, np.int32), np.zeros(3, np.float32)])
    late = Map(4, (5,), expr=E.load(0, (axis(0, 5),), "f32"))
    values = {**g.values, 4: Value(4, (5,), "f32")}
    broken = Graph(values, (*g.ops, late), g.args, (4,))
    with pytest.raises(GraphError, match="overwritten"):
        check(broken)
    with pytest.raises(GraphError, match="overwritten"):
        interpret.run(broken, [np.zeros(5, np.float32), np.zeros(3, np.int32), np.zeros(3, np.float32)])
    for c in (axis(0, 6), E.coord_add(axis(0, 5), E.coord_const(-1)), E.coord_scale(axis(0, 5), 2)):
        wild = Graph({0: Value(0, (5,), "f32", "arg", 0), 1: Value(1, (len(range(5)),), "f32")},
                     (Map(1, (5,), expr=E.load(0, (c,), "f32")),), (0,), (1,))  # fmt: skip
        with pytest.raises(GraphError, match="outside"):
            check(wild)
        if c != axis(0, 6):
            with pytest.raises(GraphError, match="outside"):
                interpret.run(wild, [np.zeros(5, np.float32)])


def test_shared_reductions_of_different_extents():
    """Two reductions bind the same id with different extents over equal sub-expressions."""
    body = E.load(0, (Coord(0, (E.Term(1, E.REDUCE_AXIS, 1, 4, 4),)),), "f32")
    twice, thrice = (E.reduce("sum", body, (E.REDUCE_AXIS,), (n,)) for n in (8, 12))
    assert twice.body is thrice.body
    g = graph([(4,), ()], [Map(1, (), expr=E.binary("add", twice, thrice))], [1])
    x = f32(4)
    np.testing.assert_allclose(interpret.run(g, [x])[0], 5 * x.sum(), rtol=1e-5)


def test_scalar_operations_have_the_types_of_the_ir():
    samples = {"f32": np.float32([0.5, -2, 3]), "i32": np.int32([1, -2, 3]), "u32": np.uint32([1, 2, 3]),
               "bool": np.array([True, False, True])}  # fmt: skip
    integers = {"u2f": "u32", "u2i": "u32", "not": "bool"}
    integers |= dict.fromkeys(("i2f", "i2u", "bitcast_i2f", "i2b", "popcount", "clz"), "i32")
    integers |= dict.fromkeys(("wrap_i8", "wrap_u8", "wrap_i16", "wrap_u16"), "i32")
    for op in E.UNARY:
        kinds = [integers.get(op, "f32")]
        kinds += ["i32", "u32"] if op in ("neg", "sign") else []
        for kind in kinds:
            with np.errstate(all="ignore"):
                out = scalar.unary(op, samples[kind])
            want = E.unary(op, E.load(0, (), kind)).dtype
            assert out.dtype == interpret.NUMPY_DTYPES[want], (op, kind, out.dtype)
    for op in E.BINARY:
        kind = "f32" if op in ("pow", "atan2") else "i32"
        out = scalar.binary(op, samples[kind], samples[kind][::-1])
        want = E.binary(op, E.load(0, (), kind), E.load(1, (), kind)).dtype
        assert out.dtype == interpret.NUMPY_DTYPES[want], op
    for op in E.REDUCE:
        out = scalar.reduce(op, samples["i32"], (0,))
        assert out.dtype == np.int32 and out.shape == (1,)


def test_constants_of_expressions():
    e = E.binary("mul", E.const(2.0, "f32"), E.unary("sqrt", E.const(9.0, "f32")))
    assert interpret.constant(e) == 6 and interpret.constant(e).dtype == np.float32


def test_fused_graphs_mean_the_same():
    """The passes that exist, on a function with all kinds of operators, bit by bit."""
    from jax_mpk.passes import fuse, recognise, simplify

    def f(x, w, cache, pos):
        h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        cache = jax.lax.dynamic_update_slice(cache, (h @ w)[:, None], (0, pos, 0))
        s = jnp.einsum("bd,bsd->bs", h, cache)
        s = jnp.where(jnp.arange(6) <= pos, s, -1e30)
        return x + jnp.einsum("bs,bsd->bd", jax.nn.softmax(s), cache), cache, jnp.sort(h), jnp.argmax(s, -1)

    args = normal((2, 4)), normal((4, 4)), normal((2, 6, 4)), jnp.int32(3)
    g = graph_of(f, *args)
    flat = [np.asarray(a) for a in args]
    want = interpret.run(g, flat)
    for stage in (simplify, recognise, simplify, fuse):
        g = check(stage.run(g))
        for x, y in zip(interpret.run(g, flat), want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    assert len(g.ops) < 8
