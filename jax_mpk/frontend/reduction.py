"""Reductions over axes. Floats are summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mpk.frontend.builder import Builder, Equation, Tensor, rounded
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import Rule, primitive, rules
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr

_REDUCE = {"reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min", "reduce_prod": "prod", "reduce_and": "and",
           "reduce_or": "or"}  # fmt: skip
_BOOLEAN = {"max": "or", "min": "and", "sum": "or", "prod": "and"}


def over_axes(x: Tensor, dims: Sequence[int], op: str) -> Expr:
    """The reduction of `x` over `dims`, at a point of the other axes."""
    dims = [int(d) for d in dims]
    bound, extents, coords, axis = [], [], [], 0
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
        e = over_axes(b.materialise(x), eqn.params["axes"], _BOOLEAN.get(op, op) if x.dtype == "bool" else op)
        return b.map(eqn.shape, eqn.dtype, rounded(e, eqn.dtype) if op in ("sum", "prod") else e)

    return rule


rules(_REDUCE, _reduction)


@primitive("argmax", "argmin")
def _argmax(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    (axis,) = eqn.params["axes"]
    if x.shape[axis] == 1:
        return b.map(eqn.shape, eqn.dtype, E.const(0, "u32" if eqn.dtype[0] == "u" else "i32"))
    e = over_axes(b.materialise(x), (axis,), eqn.primitive)
    return b.map(eqn.shape, eqn.dtype, converted(e, "i32", eqn.dtype))
