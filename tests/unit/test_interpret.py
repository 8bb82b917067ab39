"""The interpreter on graphs as passes make them: cores, appends, stores, dynamic coordinates, its own checks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_mpk.ir import expr as E
from jax_mpk.ir import interpret, scalar
from jax_mpk.ir.graph import Graph, GraphError, Map, Value, check
from jax_mpk.ir.parse import parse
from tests.unit.graphs_by_hand import matmul
from tests.unit.lowering import graph_of, normal

RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_contract_with_two_right_hand_sides():
    """out = silu(acc1) * acc0, the rows normalised in the prologue."""
    x, w0, w1 = f32(3, 8), f32(8, 5), f32(8, 5)
    g = parse("""
graph f(x:f32[3,8], w0:f32[8,5], w1:f32[8,5])
  y:f32[3,5] = contract[i0<3, i1<5]
      k: k0<8
      lhs: (x[i0, k0] - max[r0<8](x[i0, r0]))
      rhs0: w0[k0, i1]
      rhs1: w1[k0, i1]
      epilogue: (logistic(acc1) * acc0)
  return y
""")
    (out,) = interpret.run(g, [x, w0, w1])
    n = x - x.max(1, keepdims=True)
    np.testing.assert_allclose(out, 1 / (1 + np.exp(-(n @ w1))) * (n @ w0), rtol=2e-5)


def test_contract_with_broadcast_axes():
    """A contracted axis that one side does not use, a domain axis that neither uses, and integers."""
    x, w = f32(3), f32(4, 5)
    g = parse("""
graph f(x:f32[3], w:f32[4,5])
  y:f32[2,3,5] = contract[i0<2, i1<3, i2<5]
      k: k0<4
      lhs: x[i1]
      rhs0: w[k0, i2]
      epilogue: acc0
  return y
""")
    (out,) = interpret.run(g, [x, w])
    np.testing.assert_allclose(out, np.broadcast_to(x[:, None] * w.sum(0), (2, 3, 5)), rtol=1e-5)


def attention(limit, appends):
    append = """
      append cache:f32[2,7,2,5] over k8<1, i0<2, i1<2, k9<5 to v at [i0, clamp<6>(pos[i0]), i1, k9], set (out of bounds: clamp)
      append0.expr: new[i0, i1, k9]"""
    return parse(f"""
graph f(q:f32[2,2,3,4], k:f32[2,7,2,4], v:f32[2,7,2,5], new:f32[2,2,5], pos:i32[2])
  y:f32[2,2,3,5] = attention[i0<2, i1<2, i2<3, i3<5]
      batch [i0, i1] rows [i2] column i3 keys k1<7 head k0<4
      {append if appends else ""}
      q: q[i0, i1, i2, k0]
      k: k[i0, k1, i1, k0]
      v: {"cache" if appends else "v"}[i0, k1, i1, i3]
      score: (acc0 * 0.5)
      prob: acc0
      epilogue: neg(acc0)
      {"limit: (pos[i0] + 1)" if limit else ""}
  return y{", cache" if appends else ""}
""")


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
    x = f32(3, 2)
    for rows in (2, 4):
        g = parse(f"graph f(x:f32[3,2]) y:f32[{rows},3] = map[i0<3, i1<2] at [i1, i0] expr: x[i0, i1] return y")
        (y,) = interpret.run(g, [x])
        np.testing.assert_array_equal(y[:2], x.T)
        assert np.isnan(y[2:]).all()


def test_sort_keeps_ties_in_order():
    key = np.int32([[3, 1, 3, 1, 2]])
    for order, want in (("ascending", [1, 3, 4, 0, 2]), ("descending", [0, 2, 4, 1, 3])):
        g = parse(f"""
graph f(x:i32[1,5])
  y:i32[1,5] = sort[i0<1, i1<5]
      {order} indices count 5
      key: x[i0, i1]
  return y
""")
        np.testing.assert_array_equal(interpret.run(g, [key])[0][0], want)


def update(mode, oob, dtype="f32"):
    return parse(f"""
graph f(x:{dtype}[5], at:i32[3], new:f32[3])
  y:{dtype}[5] = update[i0<3]
      to x at [clamp<4>(at[i0])], {mode} (out of bounds: {oob})
      expr: new[i0]
  return y
""")


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
    late = Map(4, (5,), expr=E.load(0, (E.coord_axis(0, 5),), "f32"))
    values = {**g.values, 4: Value(4, (5,), "f32")}
    broken = Graph(values, (*g.ops, late), g.args, (4,))
    with pytest.raises(GraphError, match="overwritten"):
        check(broken)
    with pytest.raises(GraphError, match="overwritten"):
        interpret.run(broken, [np.zeros(5, np.float32), np.zeros(3, np.int32), np.zeros(3, np.float32)])
    g = parse("graph f(x:f32[5]) y:f32[5] = map[i0<5] expr: x[i0] return y")
    i = E.coord_axis(0, 5)
    for c in (E.coord_axis(0, 6), E.coord_add(i, E.coord_const(-1)), E.coord_scale(i, 2)):
        wild = g.with_ops([g.ops[0].with_exprs({"expr": E.load(0, (c,), "f32")})])
        with pytest.raises(GraphError, match="outside"):
            check(wild)
        if c != E.coord_axis(0, 6):
            with pytest.raises(GraphError, match="outside"):
                interpret.run(wild, [np.zeros(5, np.float32)])


def test_accumulators_are_those_of_the_core():
    g = parse("graph f(x:i32[3,4], w:i32[4,5])" + matmul("y", (3, 4, 5), "x[i0, k0]", "w", dtype="i32") + "return y")
    (op,) = g.ops
    for role, acc in (("epilogue", E.acc(1, (0, 1), "i32")), ("epilogue", E.acc(0, (0, 1))), ("epilogue", E.acc(0, (0,), "i32")),
                      ("lhs", E.acc(0, (0, 1), "i32"))):  # fmt: skip
        with pytest.raises(GraphError, match=f"{role} has an accumulator that the core does not have"):
            check(g.with_ops([op.with_exprs({role: acc})]))


def test_shared_reductions_of_different_extents():
    """Two reductions bind the same id with different extents over equal sub-expressions."""
    g = parse("graph f(x:f32[4]) y:f32[] = map[] expr: (sum[r0<8](x[r0%4]) + sum[r0<12](x[r0%4])) return y")
    twice, thrice = g.ops[0].expr.args()
    assert twice.body is thrice.body
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
