"""Refined graphs: equal to the graph before exactly (maps), executable by every rule of `jax_mpk.abi`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mpk import abi
from jax_mpk.backends.cpu.operators import pressure
from jax_mpk.backends.cpu.pack import pack
from jax_mpk.device import Device
from jax_mpk.errors import UnsupportedError
from jax_mpk.frontend import lower
from jax_mpk.ir import expr as E
from jax_mpk.ir import interpret, loops
from jax_mpk.ir.expr import Piece, Reduce
from jax_mpk.ir.graph import Attention, Contract, Graph, Map, Sort, Update, Value
from jax_mpk.ir.parse import parse
from jax_mpk.passes import (
    bodies,
    decompose,
    dependencies,
    events,
    fuse,
    linearise,
    memory,
    normalise,
    placement,
    refine,
    simplify,
)  # fmt: skip
from tests import vm

TARGET = Device("cpu", workers=2, columns=16, tasks=5)


def program(g: Graph) -> bytes:
    tg = bodies.run(decompose.run(g, TARGET), g, TARGET)
    for p in (dependencies, events, normalise, linearise):
        tg = p.run(tg)
    return pack(g, memory.run(placement.run(tg, g, TARGET)))


def executable(g: Graph) -> Graph:
    """Asserts what `refine` promises."""
    for op in g.ops:
        axes = loops.loop_axes(op)
        bound = 0
        list(loops.loads(g, op)), list(loops.stores(g, op))  # raise NotAffine
        for e in op.exprs().values():
            for x in E.walk(e):
                terms = x.coord.terms if isinstance(x, E.Index | Piece) else ()
                terms += tuple(t for c in x.coords if c.dyn for t in c.terms) if isinstance(x, E.Load) else ()
                assert not any(t.div != 1 or t.mod for t in terms)
                if isinstance(x, Piece):
                    assert len(x.coord.terms) == 1 and x.coord.terms[0].coef == 1
                if isinstance(x, Reduce):
                    bound = max(bound, len(x.bound))
                    assert len(x.bound) <= 4
                    inner = [y for y in E.walk(x.body) if isinstance(y, Reduce)]
                    assert all(y.axes.isdisjoint(x.bound) for y in inner)
        assert len(axes) + bound <= abi.MAX_AXES
        for operand in refine.core_operands(op).values():
            access = loops.flatten(g.values[operand.value], operand.coords)
            assert not access.dyn
            for role in ("n", "k") if isinstance(op, Contract) else ():
                over = [x for x in axes if x.role == role]
                for a, b in itertools.pairwise(over):
                    assert access.stride(a.axis) == access.stride(b.axis) * b.extent
    return g


def refined(g: Graph, *args: np.ndarray, exact: bool = True) -> Graph:
    """The refined graph; it and its program give what `g` gives."""
    r = executable(refine.run(g, pressure))
    want = interpret.run(g, args)
    for x, y in itertools.chain(zip(interpret.run(r, args), want, strict=True),
                                zip(vm.results(program(r), args, want), want, strict=True)):  # fmt: skip
        assert x.dtype == y.dtype and x.shape == y.shape
        if exact:
            np.testing.assert_array_equal(x, y, str(r))  # a maximum of zeros may have either sign
        else:
            np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=2e-5, atol=1e-5)
    return r


def of(f: Callable[..., Any], *args: Any, exact: bool = True) -> Graph:
    """Refines the graph of `f` as it is lowered, then the fused one, which it returns."""
    args = tuple(np.asarray(a) for a in args)
    g = lower(jax.make_jaxpr(f)(*args))
    refined(g, *args, exact=exact)
    return refined(fuse.run(simplify.run(g), TARGET), *args, exact=exact)


def data(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape, np.float32)


# ----------------------------------------------------------------------------------------------------------- properties


SHAPES = [(12,), (2, 6), (4, 3), (3, 4), (2, 3, 2), (6, 2), (3, 2, 2), (1, 12), (2, 2, 3)]


KINDS = ["reshape", "transpose", "reverse", "slice", "concatenate", "repeat", "tile", "roll", "iota", "pad"]
STEP = st.tuples(st.sampled_from(KINDS), st.integers(0, 999), st.integers(0, 9))
"""A step of a chain of index maps: its kind, and two numbers that choose the details."""


def apply(x: jax.Array, steps: list[tuple]) -> jax.Array:
    for kind, a, b in steps:
        axis = b % x.ndim
        n = x.shape[axis]
        if kind == "reshape":
            factors = [d for d in range(1, x.size + 1) if x.size % d == 0]
            first = factors[a % len(factors)]
            rest = x.size // first
            second = [d for d in range(1, rest + 1) if rest % d == 0][
                b % sum(rest % d == 0 for d in range(1, rest + 1))
            ]
            x = x.reshape(first, second, rest // second)
        elif kind == "transpose":
            orders = list(itertools.permutations(range(x.ndim)))
            x = x.transpose(orders[a % len(orders)])
        elif kind == "reverse":
            x = jnp.flip(x, axis)
        elif kind == "slice":
            lo = a % n
            x = jax.lax.slice_in_dim(x, lo, n, 1 + b % 3, axis)
        elif kind == "concatenate" and x.size < 60:
            x = jnp.concatenate([x, -jax.lax.slice_in_dim(x, 0, 1 + a % n, 1, axis)], axis)
        elif kind == "repeat" and x.size < 40:
            x = jnp.repeat(x, 1 + a % 3, axis)
        elif kind == "tile" and x.size < 40:
            x = jnp.tile(x, [1 + a % 3 if d == axis else 1 for d in range(x.ndim)])
        elif kind == "roll":
            x = jnp.roll(x, a % n, axis)
        elif kind == "iota":
            x = x + jax.lax.broadcasted_iota(jnp.float32, x.shape, axis)
        elif kind == "pad" and x.size < 40:
            x = jnp.pad(x, [(1, a % 3) if d == axis else (0, 0) for d in range(x.ndim)])
    return x


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.sampled_from(SHAPES),
    st.lists(STEP, min_size=1, max_size=6),
    st.sampled_from(["none", "sum", "argmax", "max"]),
    st.integers(0, 5),
)
def test_any_chain_of_views(shape: tuple[int, ...], steps: list[tuple], end: str, axis: int) -> None:
    """Splits, copies and computed digits of every kind, alone and below a reduction."""

    def f(x: jax.Array) -> jax.Array:
        y = apply(x, steps)
        if end == "none":
            return y + 1
        return {"sum": jnp.sum, "argmax": jnp.argmax, "max": jnp.max}[end](y, axis % y.ndim)

    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)  # small integers: sums are exact in any order
    of(f, x)


LETTERS = "abcdef"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_einsum(draw: st.DataObject) -> None:
    """Axes of two operands and of the result in any order, with any sharing: batch, m, n and k of any number."""
    left = draw.draw(st.permutations(LETTERS))[: draw.draw(st.integers(1, 4))]
    right = draw.draw(st.permutations(LETTERS))[: draw.draw(st.integers(1, 4))]
    both = sorted(set(left) | set(right))
    out = draw.draw(st.permutations(both))[: draw.draw(st.integers(0, len(both)))]
    size = dict(zip(LETTERS, (2, 3, 4, 1, 5, 2), strict=True))
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-4, 5, [size[a] for a in s]).astype(np.float32) for s in (left, right))
    of(lambda x, y: jnp.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", x, y), x, y)


# ------------------------------------------------------------------------------------------------------- axes of domains


def only(g: Graph, kind: type) -> Any:
    ops = [op for op in g.ops if isinstance(op, kind)]
    assert len(ops) == 1, g
    return ops[0]


def test_elementwise_axes_merge() -> None:
    assert of(lambda x, y: x * y, data(5, 3, 7), data(5, 3, 7, seed=1)).ops[0].domain == (105,)


def test_broadcast_axes_stay() -> None:
    assert of(lambda x, y: x * y[:, None], data(5, 7), data(5)).ops[0].domain == (5, 7)


def test_an_index_that_is_linear_merges_too() -> None:
    def f(x: jax.Array) -> jax.Array:
        i = jax.lax.broadcasted_iota(jnp.int32, (4, 6), 0) * 6 + jax.lax.broadcasted_iota(jnp.int32, (4, 6), 1)
        return x + i.astype(jnp.float32)

    assert len(of(f, data(4, 6)).ops[-1].domain) <= 2


def test_digits_become_axes() -> None:
    """(i // 5, i % 5) of a permuted view: two loops instead of divisions."""
    op = of(lambda x: x.T.reshape(30) + 1, data(5, 6)).ops[-1]
    assert op.domain == (6, 5)
    assert all(not a.dyn for _, _, a, _ in loops.loads(Graph({0: Value(0, (5, 6), "f32")}, (op,), (0,), ()), op))


def test_digits_that_do_not_nest_are_computed() -> None:
    """Cuts at 2 and at 3 of one axis: one of them is arithmetic."""
    r = of(lambda x, y: x.T.reshape(6) + y.T.reshape(6), data(2, 3), data(3, 2))
    assert any(a.dyn for op in r.ops for _, _, a, _ in loops.loads(r, op))


def test_unit_axes_vanish() -> None:
    assert of(lambda x: x.reshape(1, 4, 1, 5).transpose(3, 0, 2, 1) * 2, data(4, 5)).ops[-1].domain == (5, 4)


def test_too_many_axes_is_an_error_with_a_name() -> None:
    shape = (2,) * 13
    with pytest.raises(UnsupportedError, match="13 loop axes"):
        refine.run(lower(jax.make_jaxpr(lambda x: x.T + 1)(np.zeros(shape, np.float32))), pressure)


def test_reductions_over_many_axes() -> None:
    """Five axes that do not merge, in a record that holds four."""
    x = np.arange(2**10, dtype=np.float32).reshape((2,) * 10) % 7
    r = of(lambda x: x.sum((0, 2, 4, 6, 8)), x)
    assert max(len(y.bound) for op in r.ops for y in E.walk(op.expr) if isinstance(y, Reduce)) <= 4


def test_nested_reductions_become_maps() -> None:
    g = parse("""
graph f(x:f32[3,4,5])
  y:f32[3] = map[i0<3]
      expr: sum[r8<4]((max[r0<5](x[i0, r8, r0]) * max[r0<5](x[i0, r8, r0])))
  return y
""")
    r = refined(g, np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    assert [len(op.domain) for op in r.ops] == [1, 1] and r.ops[0].domain == (12,)


def test_a_nested_reduction_inside_a_piece_reads_in_bounds() -> None:
    """The inner map covers the whole axis, though only a part of it is used."""
    g = parse("""
graph f(x:f32[4,5])
  y:f32[] = map[]
      expr: sum[r8<6](piece(r8; <2: 1.0; <6: max[r0<5](x[r8-2, r0])))
  return y
""")
    assert len(refined(g, np.arange(20, dtype=np.float32).reshape(4, 5)).ops) == 2


@pytest.mark.parametrize("at", ["i0", "-i0+8", "2*i0+1", "-3*i0+8"])
def test_pieces_of_a_scaled_axis(at: str) -> None:
    g = parse(f"""
graph f(x:f32[4], y:f32[5])
  z:f32[3] = map[i0<3]
      expr: piece({at}; <4: x[{at}]; <9: y[{at}-4])
  return z
""")
    r = refined(g, data(4), data(5))
    assert not any(isinstance(x, E.Select) for x in E.walk(r.ops[0].expr))


def test_a_piece_over_two_axes_that_cannot_be_boxes() -> None:
    g = parse("""
graph f(x:f32[4], y:f32[5])
  z:f32[3,3] = map[i0<3, i1<3]
      expr: piece(3*i0+i1; <4: x[3*i0+i1]; <9: y[3*i0+i1-4])
  return z
""")
    r = refined(g, data(4), data(5))
    assert any(isinstance(x, E.Select) for op in r.ops for x in E.walk(op.expr))


# ------------------------------------------------------------------------------------------------------------- operands


def test_contracted_axes_in_another_order_need_no_copy() -> None:
    r = of(lambda x, w: jnp.einsum("bhd,dhn->bn", x, w), data(3, 4, 6), data(6, 4, 20), exact=False)
    only(r, Contract)
    assert not any(op.kind == "map" for op in r.ops)


def test_columns_in_another_order_need_no_copy() -> None:
    r = of(lambda x, w: jnp.einsum("bk,khd->bdh", x, w), data(3, 6), data(6, 4, 8), exact=False)
    op = only(r, Contract)
    assert len(r.ops) == 1 and [x.role for x in loops.loop_axes(op)].count("n") == 2


def test_columns_apart_are_copied() -> None:
    """Strides over n that are not those of one axis: a dense copy of the operand."""
    r = of(lambda x, w: jnp.einsum("bk,hkd->bhd", x, w), data(3, 6), data(4, 6, 8), exact=False)
    copy, op = r.ops
    assert copy.kind == "map" and only(r, Contract).rhs[0].value == copy.out and isinstance(op, Contract)


def test_equal_copies_are_made_once() -> None:
    w = data(4, 6, 8)
    r = of(lambda x, y, w: (jnp.einsum("bk,hkd->bhd", x, w), jnp.einsum("bk,hkd->bhd", y, w)), data(3, 6), data(2, 6), w,
           exact=False)  # fmt: skip
    assert [op.kind for op in r.ops].count("map") == 1


def test_a_gathered_operand_is_copied() -> None:
    r = of(lambda x, w, e: x @ w[e], data(3, 6), data(5, 6, 8), np.int32(2), exact=False)
    assert isinstance(r.ops[-1], Contract) and not only(r, Contract).rhs[0].args()


def attention(shape: str, at: str, new_at: str) -> Graph:
    """Two batch points, three rows, four keys; appends write position 1 of both caches."""
    return parse(f"""
graph f(q:f32[2,3,6], keys:f32[{shape}], values:f32[2,4,6], new:f32[2,6])
  y:f32[2,3,6] = attention[i0<2, i1<3, i2<6]
      batch [i0] rows [i1] column i2 keys k1<4 head k0<6
      append new_keys:f32[{shape}] over i0<2, k8<6 to keys at [{new_at}], set (out of bounds: clamp)
      append0.expr: new[i0, k8]
      append new_values:f32[2,4,6] over i0<2, k8<6 to values at [i0, 1, k8], set (out of bounds: clamp)
      append1.expr: neg(new[i0, k8])
      q: q[i0, i1, k0]
      k: new_keys[{at}]
      v: new_values[i0, k1, i2]
      score: (acc0 * 0.5)
      prob: acc0
      epilogue: acc0
  return y, new_keys, new_values
""")


def test_attention_on_plain_caches_stays_one_operator() -> None:
    g = attention("2,4,6", "i0, k1, k0", "i0, 1, k8")
    r = refined(g, data(2, 3, 6), data(2, 4, 6), data(2, 4, 6, seed=1), data(2, 6), exact=False)
    assert len(r.ops) == 1 and len(r.ops[0].appends) == 2


def test_attention_on_a_cache_that_it_cannot_stream() -> None:
    """A head dimension split in two, interleaved with the keys: the cache is updated first, then copied."""
    g = attention("2,2,4,3", "i0, k0//3, k1, k0%3", "i0, k8//3, 1, k8%3")
    r = refined(g, data(2, 3, 6), data(2, 2, 4, 3), data(2, 4, 6), data(2, 6), exact=False)
    assert [type(op) for op in r.ops] == [Update, Update, Map, Attention] and not r.ops[-1].appends


def test_sorted_rows_keep_their_axis() -> None:
    r = of(lambda x: jnp.sort(x, 0), data(9, 5))
    assert only(r, Sort).domain[-1] == 9


def test_values_keep_their_places() -> None:
    """Arguments, constants and results are neither renamed nor reordered; temporaries are new."""

    def f(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.einsum("bk,hkd->bhd", x, w), x + np.arange(6, dtype=np.float32)

    g = lower(jax.make_jaxpr(f)(data(3, 6), data(4, 6, 8)))
    r = refine.run(g, pressure)
    assert (r.args, r.results) == (g.args, g.results)
    for i, v in r.values.items():
        assert g.values.get(i, v) == v
    assert all(v.role == "temp" for i, v in r.values.items() if i not in g.values) and len(r.values) > len(g.values) - 3


def test_refining_twice_changes_nothing() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.einsum("bk,hkd->bhd", x, w)).transpose(2, 0, 1).reshape(8, 12)

    once = of(f, data(3, 6), data(4, 6, 8), exact=False)
    assert str(refine.run(once, pressure)) == str(once)
