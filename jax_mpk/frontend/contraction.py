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


@primitive("dot_general", empty=True)
def _dot_general(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
    """Sums in float32, rounded once to the result's type; of integers that give integers exact, modulo 2**32.

    Sums of a single product are plain maps. Otherwise the streamed operand becomes `rhs`.
    """
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    if 0 in x.shape or 0 in y.shape:
        return b.map(eqn.shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype)))
    k = tuple((E.CORE_AXIS + j, x.shape[d]) for j, d in enumerate(cx))
    live = tuple((a, n) for a, n in k if n > 1)
    swap = bool(live) and _streams(b, x, y)
    sums_in = accumulator(eqn, y, x) if swap else accumulator(eqn, x, y)
    if live and swap:
        x = plain(b, x, sums_in)
    elif live:
        y = plain(b, y, sums_in)
    axes, sums = identity(eqn.shape), [E.coord_axis(a, n) for a, n in k]
    batch, rest = axes[: len(bx)], axes[len(bx) :]
    free = len(x.shape) - len(cx) - len(bx)
    ex = converted(x.at(_coords(x, bx, batch, cx, sums, rest[:free])), x.dtype, sums_in)
    ey = converted(y.at(_coords(y, by, batch, cy, sums, rest[free:])), y.dtype, sums_in)
    lhs, rhs = (ey, ex) if swap else (ex, ey)
    return contracted(b, eqn, lhs, rhs, live, sums_in)


def accumulator(eqn: Equation, x: Tensor, y: Tensor) -> str:
    """The type of both sides and the sum; `y` is the plain side. Two's complement does not tell i32 from u32, so of
    integers its own will do."""
    if "f32" in (x.compute, y.compute, compute_dtype(eqn.dtype)):
        return "f32"
    return "i32" if y.compute == "bool" else y.compute


def contracted(b: Builder, eqn: Equation, lhs: Expr, rhs: Expr, k: tuple[tuple[int, int], ...], sums_in: str) -> Tensor:
    """The sum of `lhs * rhs` over the axes `k` (core axes: id, extent), a contraction if there are any: then `rhs` is a
    plain load."""
    if not k:
        return b.map(eqn.shape, eqn.dtype, result(E.binary("mul", lhs, rhs), sums_in, eqn.dtype))
    out = b.value(eqn.shape, eqn.dtype)
    epilogue = result(E.acc(0, range(len(eqn.shape)), sums_in), sums_in, eqn.dtype)
    b.emit(Contract(out, eqn.shape, b.source, None, lhs=lhs, rhs=(rhs,), k=k, epilogue=epilogue))
    return Tensor(eqn.shape, eqn.dtype, out)


def result(e: Expr, sums_in: str, dtype: str) -> Expr:
    """A sum as an element of the result. One of integers is unsigned where the result is."""
    if sums_in != "f32":
        signed = "u32" if dtype[0] == "u" else "i32"
        e, sums_in = converted(e, sums_in, signed), signed
    return rounded(converted(e, sums_in, dtype), dtype)


def plain(b: Builder, t: Tensor, sums_in: str) -> Tensor:
    """`t` as a value of that register type, whose elements are loads and nothing else."""
    if t.compute != sums_in:
        t = b.map(t.shape, sums_in, converted(t.over(t.shape), t.dtype, sums_in))
    return b.materialise(t)


def _coords(t: Tensor, batch_dims: Sequence[int], batch: Sequence[Coord], k_dims: Sequence[int], k: Sequence[Coord],
            free: Sequence[Coord]) -> list[Coord]:  # fmt: skip
    named = dict(zip(batch_dims, batch, strict=True)) | dict(zip(k_dims, k, strict=True))
    rest = iter(free)
    return [named[d] if d in named else next(rest) for d in range(len(t.shape))]


MUCH = 16
"""How many times larger data that is gathered has to be than data that is given, to be copied and streamed rather than be
the activation: a matrix that an index chooses, beside the few rows that it multiplies."""


def _streams(b: Builder, x: Tensor, y: Tensor) -> bool:
    """Whether `x` rather than `y` is the operand to stream: data that the function is given, else the larger one."""
    size_x, size_y = math.prod(x.shape), math.prod(y.shape)
    given_x, given_y = _given(b, x), _given(b, y)
    if given_x and given_y and given_x != given_y:
        return size_x >= MUCH * size_y if given_x == GATHERED else size_y < MUCH * size_x
    return bool(given_x) if bool(given_x) != bool(given_y) else size_x > size_y


_CASTS = ("round_bf16", "round_f16", "i2f", "u2f")


PLAIN, GATHERED = 2, 1


def _given(b: Builder, t: Tensor) -> int:
    """PLAIN if `t` is an argument or constant, seen through views, casts and in-place updates (a cache), GATHERED if places
    in it are dynamic; 0 for anything else."""
    value, how = t.value, PLAIN
    while value >= 0:
        op = b.producers.get(value)
        if op is None:
            return how
        if isinstance(op, Update):
            value = op.append.target
            continue
        e = op.expr if isinstance(op, Map) else None
        while isinstance(e, E.Unary) and e.op in _CASTS:
            e = e.a
        if not isinstance(e, E.Load):
            return 0
        if any(c.dyn is not None for c in e.coords):
            how = GATHERED
        value = e.value
    return 0
