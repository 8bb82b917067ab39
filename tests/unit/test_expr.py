"""Scalar expressions and coordinates: interning, substitution, splitting, text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mpk.ir import expr as E
from jax_mpk.ir import interpret
from jax_mpk.ir.expr import Coord, Term
from jax_mpk.ir.text import to_text

I0, I1 = E.coord_axis(0, 6), E.coord_axis(1, 4)


def value(c, point):
    """A coordinate at a point, from its definition."""
    return c.const + sum(
        t.coef * ((point[t.axis] // t.div) % t.mod if t.mod else point[t.axis] // t.div) for t in c.terms
    )


def points(shape):
    return [dict(enumerate(p)) for p in np.ndindex(*shape)]


def test_equal_expressions_are_one_object():
    a, b = E.load(1, (I0,), "f32"), E.load(1, (E.coord_axis(0, 6),), "f32")
    assert a is b and E.binary("add", a, b) is E.binary("add", b, a)
    assert E.const(0.0, "f32") is not E.const(-0.0, "f32")
    assert E.const(float("nan"), "f32") is E.const(float("nan"), "f32")
    assert E.const(1, "i32") is not E.const(1, "u32")
    assert E.unary("round_bf16", E.unary("round_bf16", a)) is E.unary("round_bf16", a)


def test_facts():
    a = E.load(3, (I0, Coord(0, (), E.load(4, (I1,), "i32"), 9)), "f32")
    assert a.axes == {0, 1} and a.loads == {3, 4} and a.height == 0
    r = E.reduce("sum", E.binary("mul", a, E.unary("exp", a)), (1,), (4,))
    assert r.axes == {0} and r.height == 1 and r.dtype == "f32" and r.bound == (E.REDUCE_AXIS,)
    assert E.reduce("argmax", a, (0,), (6,)).dtype == "i32"
    assert E.binary("lt", a, a).dtype == "bool" and E.unary("i2u", E.index(I0)).dtype == "u32"
    for bad in (lambda: E.unary("nope", a), lambda: E.binary("nope", a, a), lambda: E.reduce("nope", a, (0,), (6,)),
                lambda: E.reduce("argmax", a, (0, 1), (6, 4))):  # fmt: skip
        with pytest.raises(ValueError, match=r"unknown|one axis"):
            bad()


def test_reductions_are_equal_whatever_their_axes_are_called():
    def total(axis):
        return E.reduce("sum", E.load(1, (I0, E.coord_axis(axis, 4)), "f32"), (axis,), (4,))

    assert total(1) is total(70) is total(33)
    nested = E.reduce("max", E.binary("sub", E.load(1, (I0, I1), "f32"), total(9)), (0,), (6,))
    assert nested.height == 2 and nested.axes == {1}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6]), min_size=1, max_size=3), st.integers(2, 12), st.integers(0, 5),
       st.lists(st.integers(1, 12), min_size=3, max_size=3))  # fmt: skip
def test_split(shape, n, const, coefs):
    """`coord_split` gives quotient and remainder, or declines."""
    c = Coord(const)
    for a, extent in enumerate(shape):
        c = E.coord_add(c, E.coord_scale(E.coord_axis(a, extent), coefs[a]))
    split = E.coord_split(c, n)
    if split is not None:
        for p in points(shape):
            assert (value(split[0], p), value(split[1], p)) == divmod(value(c, p), n)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
def test_reshape_coords(data, new):
    """The element at row-major position p of one shape is at position p of the other."""
    primes = [p for n in new for p in ({4: [2, 2], 6: [2, 3]}.get(n, [n]))]
    order = data.draw(st.permutations(primes))
    old, n = [], 1
    for p in order:
        n *= p
        if data.draw(st.booleans()):
            old.append(n)
            n = 1
    old.append(n)
    identity = tuple(E.coord_axis(a, k) for a, k in enumerate(old))
    coords = E.reshape_coords(identity, tuple(old), tuple(new))
    if coords is not None:
        want = np.arange(int(np.prod(old))).reshape(new)
        for n, p in enumerate(points(old)):
            assert want[tuple(value(c, p) for c in coords)] == n
    flat = E.coord_axis(0, int(np.prod(new)))
    coords = E.reshape_coords((flat,), (int(np.prod(new)),), tuple(new))
    assert coords is not None  # one plain axis always splits
    for n in range(int(np.prod(new))):
        assert np.ravel_multi_index([value(c, {0: n}) for c in coords], new) == n


def test_digits_rejoin():
    split = E.coord_split(E.coord_axis(0, 24), 6)
    assert E.coord_add(E.coord_scale(split[0], 6), split[1]) == E.coord_axis(0, 24)
    assert E.coord_substitute(split[0], {0: Coord(0, (Term(6, 1, 1, 0, 4),))}, lambda e: e) == E.coord_axis(1, 4)
    with pytest.raises(E.NotAffine):
        E.coord_substitute(split[0], {0: Coord(0, (Term(5, 1, 1, 0, 4), Term(1, 2, 1, 0, 4)))}, lambda e: e)


def evaluate(e, shape, **data):
    """The expression over a domain; `data` are values by id (`v1=...`)."""
    frame = interpret._Frame(shape, {}, {int(k[1:]): v for k, v in data.items()}, (e,))
    return frame.full(e, range(len(shape)))


def test_substitution_is_evaluation_elsewhere():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    a = E.load(1, (I0, I1), "f32")
    e = E.binary("sub", a, E.reduce("max", E.load(1, (I0, E.coord_axis(70, 4)), "f32"), (70,), (4,)))
    swapped = E.substitute_axes(e, {0: I1, 1: E.coord_axis(0, 4)})  # simultaneous; shapes do not matter here
    assert swapped.axes == {0, 1}
    plain = evaluate(e, (6, 4), v1=x)
    np.testing.assert_array_equal(plain, x - x.max(1, keepdims=True))
    moved = E.substitute_axes(e, {0: E.coord_add(E.coord_scale(E.coord_axis(0, 3), 2), E.coord_const(1))})
    np.testing.assert_array_equal(evaluate(moved, (3, 4), v1=x), plain[1::2])


def test_substitution_does_not_capture():
    """Replacing an axis by the id that a reduction binds renames the reduction's axis first."""
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    row = E.reduce("sum", E.load(1, (I0, E.coord_axis(90, 4)), "f32"), (90,), (4,))
    bound = row.bound[0]
    moved = E.substitute_axes(row, {0: E.coord_axis(bound, 6)})
    assert bound in moved.axes
    back = E.substitute_axes(moved, {bound: I0})
    assert back is row
    np.testing.assert_array_equal(evaluate(back, (6,), v1=x), x.sum(1))


def test_substitute_loads():
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    inner = E.reduce("sum", E.load(1, (I0, E.coord_axis(90, 4)), "f32"), (90,), (4,))  # value 2 = row sums of value 1
    outer = E.reduce("max", E.load(2, (E.coord_axis(91, 6),), "f32"), (91,), (6,))

    def repl(load):
        return E.substitute_axes(inner, {0: load.coords[0]}) if load.value == 2 else None

    fused = E.substitute_loads(outer, repl)
    assert fused.height == 2 and fused.loads == {1}
    assert evaluate(fused, (), v1=x) == x.sum(1).max()


def test_pieces():
    a, b = E.const(1.0, "f32"), E.const(2.0, "f32")
    whole = E.piece(I0, (0, 2, 6), (a, b))
    assert E.piece(E.coord_const(3), (0, 2, 6), (a, b)) is b
    assert E.substitute_axes(whole, {0: E.coord_axis(0, 2)}) is a
    loads = E.piece(I0, (0, 2, 6), (E.load(1, (E.coord_axis(0, 6),), "f32"),
                                    E.load(2, (E.coord_add(I0, E.coord_const(-2)),), "f32")))  # fmt: skip
    ranges = {x.value: E.coord_range(x.coords[0], r) for x, r in E.walk_loads(loads)}
    assert ranges == {1: (0, 1), 2: (0, 3)}
    x, y = np.float32([1, 2]), np.float32([3, 4, 5, 6])
    np.testing.assert_array_equal(evaluate(loads, (6,), v1=x, v2=y), [1, 2, 3, 4, 5, 6])
    digit = Coord(0, (Term(1, 0, 1, 2, 2),))  # a coordinate that is no plain axis: i0 % 2
    alternating = E.piece(digit, (0, 1, 2), (E.load(1, (E.coord_const(1),), "f32"), E.unary("i2f", E.index(I0))))
    np.testing.assert_array_equal(evaluate(alternating, (6,), v1=x), [2, 1, 2, 3, 2, 5])


def test_text():
    e = E.binary("add", E.load(7, (I0, Coord(1, (Term(2, 1, 2, 0, 2),))), "f32"), E.const(0.5, "f32"))
    assert to_text(e) == "(%7[i0, 2*(i1//2)+1] + 0.5)"
    assert to_text(E.reduce("sum", E.load(7, (I0, I1), "f32"), (1,), (4,)), lambda v: "x") == "sum[r0<4](x[i0, r0])"
    x = E.load(7, (), "f32")
    for _ in range(40):  # 2**40 nodes, each shared
        x = E.binary("mul", x, E.unary("neg", x))
    assert len(to_text(x)) < 2000 and to_text(x).startswith("let $0 = ")
    assert len(list(E.walk(x))) == 81
