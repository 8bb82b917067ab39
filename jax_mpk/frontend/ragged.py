"""Products of rows in groups with a matrix a group: `ragged_dot`.

All groups are one contraction, over (group, k): a row of the activation is zero in every group but its own. The weights
of all groups are read once for each block of rows, so many rows are left to XLA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_mpk.frontend.builder import Builder, Equation, Tensor, as_i32, identity
from jax_mpk.frontend.contraction import accumulator, contracted, plain
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.cumulative import scanned
from jax_mpk.frontend.registry import primitive
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import compute_dtype

ROWS = 64
"""Rows up to which the weights of all groups are read once."""


@primitive("ragged_dot_general", empty=True)
def _ragged_dot(b: Builder, eqn: Equation, x: Tensor, y: Tensor, sizes: Tensor, *offset: Tensor) -> Tensor:
    """Groups of rows (of the result, with a group dimension of `y`), or of what is summed (the result has one of groups)."""
    d = eqn.params["ragged_dot_dimension_numbers"]
    (cx, cy), (bx, by) = d.dot_dimension_numbers
    (ragged,) = d.lhs_ragged_dimensions
    if offset or eqn.params.get("group_offset") is not None or len(sizes.shape) != 1 or ragged in bx:
        b.unsupported("only groups of rows or of what is summed are, the same ones for every batch")
    if 0 in x.shape or 0 in y.shape or not sizes.shape[0]:
        return b.map(eqn.shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype)))
    rows = math.prod(n for a, n in enumerate(x.shape) if a not in (*cx, *bx))
    if ragged not in cx and rows > ROWS:
        b.unsupported(f"{rows} rows: the weights of every group would be read for each block of {ROWS} of them")
    compute = accumulator(eqn, x, y)
    y_rank = len(y.shape)
    ends = scanned(b, b.materialise(b.map(sizes.shape, "i32", as_i32(sizes.over(sizes.shape)))), 0, False, "sum")
    if ragged in cx:  # rows that are not of a group may hold anything, on either side
        y = _by_group(b, y, ends, cy[list(cx).index(ragged)])
    y = plain(b, y, compute)

    axes = list(identity(eqn.shape))
    k = [(E.CORE_AXIS + j, x.shape[a]) for j, a in enumerate(cx)]
    at_x, at_y = [E.coord_const(0)] * len(x.shape), [E.coord_const(0)] * y_rank
    for (a, n), p, q in zip(k, cx, cy, strict=True):
        at_x[p] = at_y[q] = E.coord_axis(a, n)
    if ragged in cx:
        group = axes.pop(0)
    else:
        (own,) = d.rhs_group_dimensions
        k.append((E.CORE_AXIS + len(k), sizes.shape[0]))
        group = at_y[own] = E.coord_axis(*k[-1])
    for p, q in zip(bx, by, strict=True):
        at_x[p] = at_y[q] = axes.pop(0)
    _fill(at_x, (*cx, *bx), axes)
    _fill(at_y, (*cy, *by, *d.rhs_group_dimensions), axes)
    lhs = converted(x.at(at_x), x.dtype, compute)
    lhs = E.select(_in_group(ends, group, at_x[ragged]), lhs, E.const(0, compute))
    rhs = converted(y.at([group, *at_y] if ragged in cx else at_y), y.dtype, compute)
    return contracted(b, eqn, lhs, rhs, tuple((a, n) for a, n in k if n > 1), compute)


def _by_group(b: Builder, y: Tensor, ends: Tensor, dim: int) -> Tensor:
    """`y` for every group, a new first dimension: zero in the rows (along `dim`) of the others."""
    shape = (*ends.shape, *y.shape)
    group, *at = identity(shape)
    mine = _in_group(ends, group, at[dim])
    return b.map(shape, y.dtype, E.select(mine, y.at(at), E.const(0, compute_dtype(y.dtype))))


def _fill(at: list[Coord], named: Sequence[int], axes: list[Coord]) -> None:
    """The free dimensions take the next axes of the result."""
    for a in range(len(at)):
        if a not in named:
            at[a] = axes.pop(0)


def _in_group(ends: Tensor, group: Coord, row: Coord) -> Expr:
    """Whether a row lies in a group; groups end at `ends`, and each starts where the one before it ends."""
    at, end = E.index(row), ends.at([group])
    n = ends.shape[0]
    before = E.piece(group, (0, 1, n), (E.const(0, "i32"), ends.at([E.coord_add(group, E.coord_const(-1))])))
    return E.binary("and", E.binary("le", before, at), E.binary("lt", at, end))
