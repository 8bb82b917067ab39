"""Reductions over axes. Floats are summed in float32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax_mpk import _compat
from jax_mpk.frontend.builder import Builder, Equation, Tensor, rounded
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import Rule, primitive, rules
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import compute_dtype, itemsize

_REDUCE = {"reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min", "reduce_prod": "prod", "reduce_and": "and",
           "reduce_or": "or"}  # fmt: skip
_BOOLEAN = {"max": "or", "min": "and", "sum": "or", "prod": "and", "xor": "ne"}
_COMBINE = {"sum": "add", "prod": "mul", "max": "max", "min": "min", "and": "and", "or": "or", "xor": "xor"}
MONOIDS = {"add": "sum", "mul": "prod", "max": "max", "min": "min", "and": "and", "or": "or", "xor": "xor"}


def combine(op: str, x: Expr, y: Expr) -> Expr:
    """Two elements combined by a reduction (before any rounding)."""
    if op == "logsumexp":
        apart = E.unary("exp", E.unary("neg", E.unary("abs", E.binary("sub", x, y))))
        apart = E.select(E.binary("eq", x, y), E.const(1.0, "f32"), apart)  # also of two infinities
        return E.binary("add", E.binary("max", x, y), E.unary("log1p", apart))
    return E.binary(_BOOLEAN.get(op, op) if x.dtype == "bool" else _COMBINE[op], x, y)


def monoid(jaxpr: Any) -> str | None:
    """The reduction whose function of two scalars a jaxpr is, if it is one that has a name."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    if len(jaxpr.eqns) != 1 or len(jaxpr.invars) != 2:
        return None
    (eqn,) = jaxpr.eqns
    same = set(eqn.invars) == set(jaxpr.invars) and list(eqn.outvars) == list(jaxpr.outvars)
    return MONOIDS.get(eqn.primitive.name) if same and len(eqn.invars) == 2 else None


def neutral(op: str, dtype: str) -> Expr:
    """What `op` of nothing gives, in the type that expressions compute with."""
    compute = compute_dtype(dtype)
    if op in ("sum", "prod", "and", "or", "xor") or compute == "bool":
        empty = {"sum": 0, "prod": 1, "and": -1, "or": 0, "max": 0, "min": 1, "xor": 0}[op]
        return E.const(empty, compute) if compute != "u32" else E.const(empty % 2**32, compute)
    if op == "logsumexp":
        return E.const(-math.inf, "f32")
    low, high = {"f32": (-math.inf, math.inf), "i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1)}[compute]
    if dtype not in ("f32", "bf16", "f16", "i32", "u32"):  # the extremes of a narrow integer
        bits = 8 * itemsize(dtype)
        low, high = (0, 2**bits - 1) if compute == "u32" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return E.const(low if op == "max" else high, compute)


def over(op: str, e: Expr, bound: tuple[int, ...], extents: tuple[int, ...]) -> Expr:
    """`e` reduced over bound axes."""
    if op != "logsumexp":
        return E.reduce(op, e, bound, extents)
    largest = E.reduce("max", e, bound, extents)
    top = E.select(E.unary("is_finite", largest), largest, E.const(0.0, "f32"))
    total = E.reduce("sum", E.unary("exp", E.binary("sub", e, top)), bound, extents)
    return E.binary("add", E.unary("log", total), top)


def over_axes(x: Tensor, dims: Sequence[int], op: str) -> Expr:
    """The reduction of `x` over `dims`, at a point of the other axes."""
    dims = [int(d) for d in dims]
    bound: list[int] = []
    extents: list[int] = []
    coords, axis = [], 0
    for d, n in enumerate(x.shape):
        if d in dims:
            a = E.REDUCE_AXIS + len(bound)
            coords.append(E.coord_axis(a, n))
            if n > 1:
                bound.append(a)
                extents.append(n)
        else:
            coords.append(Coord(0, E.coord_axis(axis, n).terms))
            axis += 1
    e = x.at(coords)
    return E.reduce(op, e, tuple(bound), tuple(extents)) if bound else e


def _reduction(op: str) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
        if 0 in x.shape:
            return b.map(eqn.shape, eqn.dtype, neutral(op, x.dtype))
        return reduced(b, eqn, x, eqn.params["axes"], op)

    return rule


def reduced(b: Builder, eqn: Equation, x: Tensor, axes: Sequence[int], op: str, init: Expr | None = None) -> Tensor:
    """The result of `eqn`: `x` reduced over `axes`, and `init` (if given)."""
    e = over_axes(b.materialise(x), axes, _BOOLEAN.get(op, op) if x.dtype == "bool" else op)
    e = e if init is None else combine(op, init, e)
    return b.map(eqn.shape, eqn.dtype, rounded(e, eqn.dtype) if op in ("sum", "prod") else e)


rules(_REDUCE, _reduction, empty=True)


@primitive("argmax", "argmin")
def _argmax(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    (axis,) = eqn.params["axes"]
    if x.shape[axis] == 1:
        return b.map(eqn.shape, eqn.dtype, E.const(0, "u32" if eqn.dtype[0] == "u" else "i32"))
    e = over_axes(b.materialise(x), (axis,), eqn.primitive)
    return b.map(eqn.shape, eqn.dtype, converted(e, "i32", eqn.dtype))
