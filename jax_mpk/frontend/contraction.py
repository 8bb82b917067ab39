"""Contractions: `dot_general` in every arrangement of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import primitive
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import Contract, Map, Update, compute_dtype


@primitive("dot_general")
def _dot_general(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
    """Sums in float32 (integers: exact, in 32 bits), rounded once to the result's type.

    Integers, and sums of a single product, are plain maps. Otherwise the streamed operand becomes `rhs`.
    """
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    compute = "f32" if "f32" in (x.compute, y.compute) else "u32" if eqn.dtype[0] == "u" else "i32"
    if 0 in x.shape or 0 in y.shape:
        return b.map(eqn.shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype)))
    k = tuple((E.CORE_AXIS + j, x.shape[d]) for j, d in enumerate(cx))
    live = tuple((a, n) for a, n in k if n > 1)
    core = compute == "f32" and bool(live)
    swap = core and _streams(b, x, y)
    if core and swap:
        x = _plain(b, x)
    elif core:
        y = _plain(b, y)
    axes, sums = identity(eqn.shape), [E.coord_axis(a, n) for a, n in k]
    batch, rest = axes[: len(bx)], axes[len(bx) :]
    free = len(x.shape) - len(cx) - len(bx)
    ex = converted(x.at(_coords(x, bx, batch, cx, sums, rest[:free])), x.dtype, compute)
    ey = converted(y.at(_coords(y, by, batch, cy, sums, rest[free:])), y.dtype, compute)
    if not core:
        e = E.binary("mul", ex, ey)
        if live:
            e = E.reduce("sum", e, tuple(a for a, _ in live), tuple(n for _, n in live))
        return b.map(eqn.shape, eqn.dtype, _result(e, compute, eqn.dtype))
    lhs, rhs = (ey, ex) if swap else (ex, ey)
    out = b.value(eqn.shape, eqn.dtype)
    epilogue = _result(E.acc(0, range(len(eqn.shape))), compute, eqn.dtype)
    b.emit(Contract(out, eqn.shape, b.source, None, lhs=lhs, rhs=(rhs,), k=live, epilogue=epilogue))
    return Tensor(eqn.shape, eqn.dtype, out)


def _result(e: Expr, compute: str, dtype: str) -> Expr:
    return rounded(converted(e, compute, dtype), dtype)


def _plain(b: Builder, t: Tensor) -> Tensor:
    """`t` as a value of floats, whose elements are loads and nothing else."""
    if t.compute != "f32":
        t = b.map(t.shape, "f32", converted(t.over(t.shape), t.dtype, "f32"))
    return b.materialise(t)


def _coords(t: Tensor, batch_dims: Sequence[int], batch: Sequence[Coord], k_dims: Sequence[int], k: Sequence[Coord],
            free: Sequence[Coord]) -> list[Coord]:  # fmt: skip
    named = dict(zip(batch_dims, batch, strict=True)) | dict(zip(k_dims, k, strict=True))
    rest = iter(free)
    return [named[d] if d in named else next(rest) for d in range(len(t.shape))]


def _streams(b: Builder, x: Tensor, y: Tensor) -> bool:
    """Whether `x` rather than `y` is the operand to stream: data that the function is given, else the larger one."""
    given_x, given_y = _given(b, x), _given(b, y)
    if given_x != given_y:
        return given_x
    return math.prod(x.shape) > math.prod(y.shape)


_CASTS = ("round_bf16", "round_f16", "i2f", "u2f")


def _given(b: Builder, t: Tensor) -> bool:
    """Whether `t` is an argument or constant, seen through views, casts and in-place updates (a cache)."""
    value = t.value
    while value >= 0:
        op = b.producers.get(value)
        if op is None:
            return True
        if isinstance(op, Update):
            value = op.append.target
            continue
        e = op.expr if isinstance(op, Map) else None
        while isinstance(e, E.Unary) and e.op in _CASTS:
            e = e.a
        if not isinstance(e, E.Load) or any(c.dyn is not None for c in e.coords):
            return False
        value = e.value
    return False
