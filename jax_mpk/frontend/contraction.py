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
    """Sums in float32, rounded once to the result's type; of integers that give integers exact, modulo 2**32.

    Sums of a single product are plain maps. Otherwise the streamed operand becomes `rhs`.
    """
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    floats = "f32" in (x.compute, y.compute, compute_dtype(eqn.dtype))
    k = tuple((E.CORE_AXIS + j, x.shape[d]) for j, d in enumerate(cx))
    live = tuple((a, n) for a, n in k if n > 1)
    swap = bool(live) and _streams(b, x, y)
    # One type for both sides and the sum: two's complement does not tell i32 from u32, so that of the plain side will do.
    plain = x if swap else y
    sums_in = "f32" if floats else "i32" if plain.compute == "bool" else plain.compute
    if live and swap:
        x = _plain(b, x, sums_in)
    elif live:
        y = _plain(b, y, sums_in)
    axes, sums = identity(eqn.shape), [E.coord_axis(a, n) for a, n in k]
    batch, rest = axes[: len(bx)], axes[len(bx) :]
    free = len(x.shape) - len(cx) - len(bx)
    ex = converted(x.at(_coords(x, bx, batch, cx, sums, rest[:free])), x.dtype, sums_in)
    ey = converted(y.at(_coords(y, by, batch, cy, sums, rest[free:])), y.dtype, sums_in)
    if not live:
        return b.map(eqn.shape, eqn.dtype, _result(E.binary("mul", ex, ey), sums_in, eqn.dtype))
    lhs, rhs = (ey, ex) if swap else (ex, ey)
    out = b.value(eqn.shape, eqn.dtype)
    epilogue = _result(E.acc(0, range(len(eqn.shape)), sums_in), sums_in, eqn.dtype)
    b.emit(Contract(out, eqn.shape, b.source, None, lhs=lhs, rhs=(rhs,), k=live, epilogue=epilogue))
    return Tensor(eqn.shape, eqn.dtype, out)


def _result(e: Expr, sums_in: str, dtype: str) -> Expr:
    """A sum as an element of the result. One of integers is unsigned where the result is."""
    if sums_in != "f32":
        signed = "u32" if dtype[0] == "u" else "i32"
        e, sums_in = converted(e, sums_in, signed), signed
    return rounded(converted(e, sums_in, dtype), dtype)


def _plain(b: Builder, t: Tensor, sums_in: str) -> Tensor:
    """`t` as a value of that register type, whose elements are loads and nothing else."""
    if t.compute != sums_in:
        t = b.map(t.shape, sums_in, converted(t.over(t.shape), t.dtype, sums_in))
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
