"""Cumulative sums, products and extremes. Sums of narrow floats stay float32 until the end."""

from __future__ import annotations

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.reduction import neutral, over
from jax_mpk.frontend.registry import Rule, rules
from jax_mpk.ir import expr as E
from jax_mpk.ir.graph import Scan

DIRECT = 48
"""Up to this length each result is a reduction over a masked row, which fuses into what is around it."""

_KINDS = {"cumsum": "sum", "cumprod": "prod", "cummax": "max", "cummin": "min", "cumlogsumexp": "logsumexp"}


def _cumulative(op: str) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
        if x.dtype == "bool":
            b.unsupported("booleans")
        return scanned(b, b.materialise(x), eqn.params["axis"], eqn.params["reverse"], op)

    return rule


def scanned(b: Builder, x: Tensor, axis: int, reverse: bool, op: str) -> Tensor:
    """`x` with every element along `axis` combined with those before it (`reverse`: behind it)."""
    n = x.shape[axis]
    if n == 1:
        return x
    coords = identity(x.shape)
    if n <= DIRECT:
        there = E.coord_axis(E.REDUCE_AXIS, n)
        i, j = E.index(coords[axis]), E.index(there)
        seen = E.binary("le", i, j) if reverse else E.binary("le", j, i)
        e = E.select(seen, x.at([*coords[:axis], there, *coords[axis + 1 :]]), neutral(op, x.dtype))
        return b.map(x.shape, x.dtype, rounded(over(op, e, (E.REDUCE_AXIS,), (n,)), x.dtype))
    element = x.at(coords)
    acc = E.acc(0, range(len(x.shape)), element.dtype)
    out = b.value(x.shape, x.dtype)
    b.emit(Scan(out, x.shape, b.source, None, element, op, axis, reverse, rounded(acc, x.dtype)))
    return Tensor(x.shape, x.dtype, out)


rules(_KINDS, _cumulative)
