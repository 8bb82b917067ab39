"""Rewrites of one expression that never change a bit of its value.

Only identities that hold for every float (NaN, infinities and signed zeros included) are used, so that a function
gives the same result whichever way it was spelled and however it was fused. Integer comparisons fold by range.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jax_mpk.ir import expr as E
from jax_mpk.ir import scalar
from jax_mpk.ir.expr import Binary, Const, Coord, Expr, Index, Load, Select, Unary

_INT_FOLD: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": max, "min": min, "and": operator.and_,
    "or": operator.or_, "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_F32_FOLD: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": scalar.maximum, "min": scalar.minimum,
    "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


REGISTER = {"f32": np.float32, "i32": np.int32, "u32": np.uint32, "bool": np.bool_}


UNCHANGED = object.__new__(Expr)
"""Stands for the node itself."""


def simplify(e: Expr) -> Expr:
    """`e` rewritten bottom-up. Every node remembers its simplest form, so that fused expressions cost what is new."""
    hit = e.simple
    if hit is None:
        hit = _rule(E.rebuild(e, simplify, _coord))
        e.simple = hit if hit is not e else UNCHANGED
    return e if hit is UNCHANGED else hit


def fold_constants(e: Expr) -> Expr:
    """`e` with operations of constants computed, and nothing else: coordinates stay as they are.

    What pieces leave behind must not get to a compiler for GPUs: NVRTC 13.0 takes it that `-inf - -inf` is no NaN.
    """
    memo: dict[Expr, Expr] = {}
    for x in E.walk(e):
        y = E.rebuild(x, lambda a: memo.get(a, a), lambda c: c)
        memo[x] = _value(y) if isinstance(y, Unary | Binary) and all(isinstance(a, Const) for a in y.args()) else y
    return memo[e]


def _value(x: Unary | Binary) -> Expr:
    """An operation of constants, computed as the interpreter does."""
    args: list[np.ndarray] = [np.array(a.value, REGISTER[a.dtype]) for a in x.args() if isinstance(a, Const)]
    with np.errstate(all="ignore"):
        out = scalar.unary(x.op, *args) if isinstance(x, Unary) else scalar.binary(x.op, *args)
    return E.const(np.asarray(out).item(), x.dtype)


def _coord(c: Coord) -> Coord:
    if c.dyn is None:
        return c
    return settle(Coord(c.const, c.terms, simplify(c.dyn), c.limit))


def settle(c: Coord) -> Coord:
    """A dynamic coordinate whose value turns out to be a coordinate (and in range) becomes a static one."""
    if c.dyn is None:
        return c
    static = Coord(c.const, c.terms)
    if isinstance(c.dyn, Const):
        whole = E.coord_add(static, E.coord_const(int(c.dyn.value)))
    elif isinstance(c.dyn, Index):
        whole = E.coord_add(static, c.dyn.coord)
    else:
        return c
    return whole if whole.min >= 0 and whole.max <= c.limit else c


def _rule(x: Expr) -> Expr:
    if isinstance(x, Unary):
        return _unary(x)
    if isinstance(x, Binary):
        return _int_binary(x) if x.a.dtype in ("i32", "u32", "bool") else _f32_binary(x)
    if isinstance(x, Select) and isinstance(x.cond, Unary) and x.cond.op == "not":
        return E.select(x.cond.a, x.b, x.a)
    if isinstance(x, Select) and x.dtype == "bool" and isinstance(x.a, Const) and isinstance(x.b, Const):
        return x.cond if x.a.value else E.unary("not", x.cond)
    return x


def _unary(x: Unary) -> Expr:
    a = x.a
    if isinstance(a, Const):
        v = a.value
        if x.op == "neg" and a.dtype in ("f32", "i32"):
            return E.const(-v, a.dtype)
        if x.op == "not" and a.dtype == "bool":
            return E.const(not v, "bool")
        if x.op in ("i2f", "u2f"):
            return E.const(int(v), "f32")
        if x.op == "round_bf16":
            return E.const(float(np.float32(v).astype(ml_dtypes.bfloat16)), "f32")
        if x.op == "round_f16":
            return E.const(float(np.float32(v).astype(np.float16)), "f32")
        if x.op in ("i2b", "f2b"):
            return E.const(v != 0, "bool")
    if isinstance(a, Unary) and (x.op, a.op) in (("u2i", "i2u"), ("i2u", "u2i")):
        return a.a
    if x.op == "not" and isinstance(a, Unary) and a.op == "not" and a.dtype == "bool":
        return a.a
    return x


def _int_binary(x: Binary) -> Expr:
    a, b, op = x.a, x.b, x.op
    if isinstance(a, Const) and isinstance(b, Const) and op in _INT_FOLD:
        value = int(_INT_FOLD[op](int(a.value), int(b.value)))
        lo, hi = (0, 2**32) if x.dtype == "u32" else (-(2**31), 2**31)
        if lo <= value < hi:
            return E.const(value, x.dtype)
    if a.dtype == "bool":
        for p, q in ((a, b), (b, a)):
            if isinstance(p, Const) and op in ("and", "or"):
                return q if bool(p.value) == (op == "and") else p
        return x
    if isinstance(b, Const) and b.value == 0 and op in ("add", "sub", "or", "xor", "shl", "shr", "sar"):
        return a
    if isinstance(a, Const) and a.value == 0 and op in ("add", "or", "xor"):
        return b
    if isinstance(b, Const) and b.value == 1 and op in ("mul", "div"):
        return a
    if isinstance(a, Const) and a.value == 1 and op == "mul":
        return b
    if a.dtype != "i32":
        return x
    if op in ("add", "sub", "mul"):
        return _index_arithmetic(x)
    ra, rb = int_range(a), int_range(b)
    if ra and rb:
        if op == "lt" and (ra[1] < rb[0] or ra[0] >= rb[1]):
            return E.const(ra[1] < rb[0], "bool")
        if op == "le" and (ra[1] <= rb[0] or ra[0] > rb[1]):
            return E.const(ra[1] <= rb[0], "bool")
        if op in ("eq", "ne") and (ra[1] < rb[0] or ra[0] > rb[1]):
            return E.const(op == "ne", "bool")
        if op in ("max", "min") and (ra[1] <= rb[0] or ra[0] >= rb[1]):
            return b if (ra[1] <= rb[0]) == (op == "max") else a
        if op == "rem" and ra[0] >= 0 and rb[0] == rb[1] and isinstance(a, Index):
            split = E.coord_split(a.coord, rb[0]) if rb[0] > 0 else None
            return E.index(split[1]) if split else x
        if op == "div" and ra[0] >= 0 and rb[0] == rb[1] and isinstance(a, Index):
            split = E.coord_split(a.coord, rb[0]) if rb[0] > 0 else None
            return E.index(split[0]) if split else x
    return x


def _index_arithmetic(x: Binary) -> Expr:
    """Sums and multiples of indices are indices."""

    def coord(e: Expr) -> Coord | None:
        return e.coord if isinstance(e, Index) else E.coord_const(int(e.value)) if isinstance(e, Const) else None

    a, b = coord(x.a), coord(x.b)
    if a is None or b is None:
        return x
    if x.op == "mul":
        if a.terms and b.terms:
            return x
        return E.index(E.coord_scale(a, b.const) if a.terms else E.coord_scale(b, a.const))
    return E.index(E.coord_add(a, b if x.op == "add" else E.coord_scale(b, -1)))


def int_range(e: Expr) -> tuple[int, int] | None:
    """Bounds of an i32 expression where they are evident, else None."""
    if isinstance(e, Const):
        return int(e.value), int(e.value)
    if isinstance(e, Index):
        return e.coord.min, e.coord.max
    return None


def _f32_binary(x: Binary) -> Expr:
    a, b, op = x.a, x.b, x.op
    if isinstance(a, Const) and isinstance(b, Const) and op in _F32_FOLD:
        with np.errstate(all="ignore"):
            value = _F32_FOLD[op](np.array(a.value, np.float32), np.array(b.value, np.float32))
        return E.const(bool(value) if x.dtype == "bool" else float(value), x.dtype)
    if isinstance(b, Const):
        zero = b.value == 0.0
        if op == "sub" and zero and not np.signbit(b.value):  # x - (+0) is x, also for -0
            return a
        if op == "add" and zero and np.signbit(b.value):
            return a
        if op in ("mul", "div") and b.value == 1.0:
            return a
        if (op == "max" and b.value == float("-inf")) or (op == "min" and b.value == float("inf")):
            return a
    if isinstance(a, Const):
        if op == "mul" and a.value == 1.0:
            return b
        if (op == "max" and a.value == float("-inf")) or (op == "min" and a.value == float("inf")):
            return b
    return x


BOXES = 9
"""Most boxes of a view with pieces over several axes (a border in two dimensions has 9): what reads one multiplies them."""


def is_view(e: Expr) -> bool:
    """An index map and nothing else: a load with static coordinates, a constant, or some pieces of those."""
    return _is_view(e) and (not isinstance(e, E.Piece) or len(cuts(e)) <= 1 or boxes(e) <= BOXES)


def cuts(e: Expr) -> dict[frozenset[int], int]:
    """How often an expression is taken apart, by the axes of the pieces' coordinates."""
    at: dict[frozenset[int], set[tuple[Coord, int]]] = {}
    for x in E.walk(e):
        if isinstance(x, E.Piece):
            at.setdefault(x.coord.axes(), set()).update((x.coord, b) for b in x.bounds[1:-1])
    return {axes: len(places) for axes, places in at.items()}


def boxes(e: Expr) -> int:
    """About how many boxes of an expression have no pieces left: along several axes they multiply."""
    return math.prod(1 + n for n in cuts(e).values())


def _is_view(e: Expr) -> bool:
    if isinstance(e, E.Piece):
        return all(_is_view(p) for p in e.parts)
    return isinstance(e, Const) or (isinstance(e, Load) and all(c.dyn is None for c in e.coords))
