"""Pass `partial`: the extreme of a long row is found in two steps.

A row reduction runs in one task, because its row is not cut. For the argmax of a vocabulary on a device with many
workers that is one worker at work and all others idle, at the end of every step. So

    out[i] = argmax over r < n of body(i, r)

becomes the argmax of overlapping slices, many tasks that start as soon as their part of the row is there, and the best of
their candidates, looked at again where they lie:

    at[i, s] = argmax over r < length of body(i, step*s + r)
    out[i]   = step*t + at[i, t],   t = argmax over s of body(i, step*s + at[i, s])

Exact, ties and NaN included: a slice gives its first extreme, and of equal candidates the first slice wins. Overlap does
no harm: an extreme that two slices share is a candidate of the earlier one, or comes after its candidate. With it all
slices have one length whatever n is, and start at a multiple of the columns of a contraction's task.
"""

from __future__ import annotations

import math

from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Reduce
from jax_mpk.ir.graph import Graph, Map, Op, Value

SLICE = 2048
"""Elements of a slice, at least: a task of its own, whose threads read all they need at once. Shorter slices share tasks
(`MIN_COST` of `jax_mpk.kinds.rows`) and make the second step longer."""
SLICES = 8
"""Slices of a row, at least: with fewer the second step costs more than it saves."""


def run(g: Graph, target: Device) -> Graph:
    """The graph with argmax and argmin over long rows in two steps, where `target` has workers for the first one."""
    values = dict(g.values)
    ops: list[Op] = []
    for op in g.ops:
        for r in _long(op, target):
            try:
                first, index = _two_steps(values, op, r, target)
            except E.NotAffine:
                continue  # the row is read through a map of indices that slices do not follow
            ops.append(first)
            op = op.with_exprs({role: _replace(e, r, index) for role, e in op.exprs().items()})
        ops.append(op)
    return g.with_ops(ops, values)


def _long(op: Op, target: Device) -> list[Reduce]:
    """The reductions of a map that are worth two steps. One that depends on another reduction would repeat that one."""
    if not isinstance(op, Map):
        return []
    axes = frozenset(range(len(op.domain)))
    return [x for x in E.walk(op.expr) if isinstance(x, Reduce) and x.op in ("argmax", "argmin") and not x.body.height
            and x.axes <= axes and _slices(op, x, target) >= SLICES]  # fmt: skip


def _slices(op: Op, r: Reduce, target: Device) -> int:
    """How many slices keep the workers busy."""
    return min(r.extents[0] // SLICE, target.tasks // math.prod(op.domain[a] for a in r.axes))


def _two_steps(values: dict[int, Value], op: Op, r: Reduce, target: Device) -> tuple[Map, Expr]:
    """The map that finds the candidates, and the index of the best of them in place of `r`."""
    (n,), (axis,), free = r.extents, r.bound, sorted(r.axes)
    least = math.ceil(n / _slices(op, r, target) / target.columns) * target.columns
    step = min(
        range(least, 2 * least, target.columns), key=lambda x: x + n % x
    )  # the shortest slices that reach the end
    count, length = n // step, step + n % step

    rows = tuple(op.domain[a] for a in free)
    own = {a: E.coord_axis(j, n) for j, (a, n) in enumerate(zip(free, rows, strict=True))}
    start = E.coord_scale(E.coord_axis(len(free), count), step)
    inside = E.substitute_axes(r.body, {**own, axis: E.coord_add(start, E.coord_axis(axis, length))})
    at = max(values) + 1
    values[at] = Value(at, (*rows, count), "i32")
    first = Map(at, (*rows, count), op.source, None, E.reduce(r.op, inside, (axis,), (length,)))

    here = tuple(E.coord_axis(a, op.domain[a]) for a in free)
    start = E.coord_scale(E.coord_axis(axis, count), step)
    candidate = E.load(at, (*here, E.coord_axis(axis, count)), "i32")
    where = Coord(start.const, start.terms, candidate, n - 1)
    best = E.reduce(r.op, E.substitute_axes(r.body, {axis: where}), (axis,), (count,))
    offset = E.load(at, (*here, Coord(0, (), best, count - 1)), "i32")
    return first, E.binary("add", E.binary("mul", best, E.const(step, "i32")), offset)


def _replace(e: Expr, old: Expr, new: Expr) -> Expr:
    """`e` with `new` in place of `old`."""
    memo = {old: new}

    def go(x: Expr) -> Expr:
        if x not in memo:
            memo[x] = E.rebuild(
                x, go, lambda c: Coord(c.const, c.terms, go(c.dyn), c.limit) if c.dyn is not None else c
            )
        return memo[x]

    return go(e)
