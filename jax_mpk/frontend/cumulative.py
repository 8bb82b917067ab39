"""Cumulative sums, products and extremes."""

from __future__ import annotations

import math

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.registry import Rule, rules
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr

DIRECT = 4096
"""Up to this length each result is one reduction over a masked row: n*n work, but a single operator."""

_KINDS = {"cumsum": "sum", "cumprod": "prod", "cummax": "max", "cummin": "min"}
_COMBINE = {"sum": "add", "prod": "mul", "max": "max", "min": "min"}


def _neutral(op: str, dtype: str) -> Expr:
    compute = "f32" if dtype in ("f32", "bf16", "f16") else "u32" if dtype[0] == "u" else "i32"
    if op in ("sum", "prod"):
        return E.const(op == "prod", compute)
    low, high = {"f32": (-math.inf, math.inf), "i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1)}[compute]
    return E.const(low if op == "max" else high, compute)


def _cumulative(op: str) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
        axis, reverse, n = eqn.params["axis"], eqn.params["reverse"], x.shape[eqn.params["axis"]]
        if x.dtype == "bool":
            b.unsupported("booleans")
        x = b.materialise(x)
        if n == 1:
            return x
        return (_masked if n <= DIRECT else _doubling)(b, x, axis, reverse, op)

    return rule


def _masked(b: Builder, x: Tensor, axis: int, reverse: bool, op: str) -> Tensor:
    """Every result on its own: the row up to its index."""
    coords = list(identity(x.shape))
    here = E.index(coords[axis])
    coords[axis] = E.coord_axis(E.REDUCE_AXIS, x.shape[axis])
    there = E.index(coords[axis])
    seen = E.binary("le", here, there) if reverse else E.binary("le", there, here)
    e = E.select(seen, x.at(coords), _neutral(op, x.dtype))
    return b.map(x.shape, x.dtype, rounded(E.reduce(op, e, (E.REDUCE_AXIS,), (x.shape[axis],)), x.dtype))


def _doubling(b: Builder, x: Tensor, axis: int, reverse: bool, op: str) -> Tensor:
    """log2(n) operators, each of which combines results `step` apart. Partial sums of narrow floats stay float32."""
    n, dtype, step = x.shape[axis], x.dtype, 1
    wide = x.compute
    while step < n:
        coords = list(identity(x.shape))
        own = x.at(coords)
        coords[axis] = E.coord_add(coords[axis], E.coord_const(step if reverse else -step))
        both = E.binary(_COMBINE[op], own, x.at(coords))
        bounds, parts = ((0, n - step, n), (both, own)) if reverse else ((0, step, n), (own, both))
        last = 2 * step >= n
        e = E.piece(identity(x.shape)[axis], bounds, parts)
        x = b.map(x.shape, dtype if last else wide, rounded(e, dtype) if last else e)
        step *= 2
    return x


rules(_KINDS, _cumulative)
