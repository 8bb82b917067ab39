"""Pass `partial`: the extreme of a long row is found in two steps, and so are its k largest.

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

The k largest of a row are among the k largest of its slices, which do not overlap here; what is left over at the end of the row joins
the candidates as it is. Candidates lie in the order of the row where they are equal, so the second sort is stable as well.
"""

from __future__ import annotations

import math
from dataclasses import replace

from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Reduce
from jax_mpk.ir.graph import Graph, Map, Op, Sort, Value

SLICE = 2048
"""Elements of a slice, at least: a task of its own, whose threads read all they need at once. Shorter slices share tasks
(`MIN_COST` of `jax_mpk.kinds.rows`) and make the second step longer."""
SLICES = 8
"""Slices of a row, at least: with fewer the second step costs more than it saves."""
TURNS = 4
"""Slices of sorted rows that a worker may have to do one after the other: a short row takes less to sort than its share of a long one."""


def run(g: Graph, target: Device) -> Graph:
    """The graph with argmax, argmin and top-k over long rows in two steps, where `target` has workers for the first one."""
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
        ops += _ranked(values, op, target) if isinstance(op, Sort) else (op,)
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


def _ranked(values: dict[int, Value], op: Sort, target: Device) -> tuple[Op, ...]:
    """A top-k in two steps, if it is worth that: the best positions of every slice, the positions of all candidates, the
    best of these, and which positions they are."""
    (*rows, n), k = op.domain, op.count
    if op.payload != "indices" or op.count == n or op.store is not None:
        return (op,)
    count = min(n // max(SLICE // 2, math.isqrt(n * k)), TURNS * target.tasks // math.prod(rows))
    if count < SLICES or target.tasks < SLICES * TURNS:
        return (op,)
    length, own, row = n // count, [E.coord_axis(a, x) for a, x in enumerate(rows)], len(rows)
    best, left = min(k, length), n - count * length
    found = count * best + left

    def value(*shape: int) -> int:
        at = max(values) + 1
        values[at] = Value(at, (*rows, *shape), "i32")
        return at

    def sort(out: int, key: Expr, kept: int, *shape: int) -> Sort:
        return replace(op, out=out, domain=(*rows, *shape), key=key, count=kept)

    at, where, which = value(count, best), value(found), value(k)
    start = E.coord_scale(E.coord_axis(row, count), length)
    inside = E.substitute_axes(op.key, {row: E.coord_add(start, E.coord_axis(row + 1, length))})
    candidate = E.coord_axis(row, found)
    split = E.coord_split(E.coord_axis(row, count * best), best)
    assert split is not None
    position = E.binary("add", E.coord_value(E.coord_scale(split[0], length)), E.load(at, (*own, *split), "i32"))
    rest = E.coord_value(E.coord_add(candidate, E.coord_const(count * (length - best))))
    listed = E.piece(candidate, (0, count * best, found), (position, rest)) if left else position
    there = Coord(0, (), E.load(where, (*own, candidate), "i32"), n - 1)
    chosen = Coord(0, (), E.load(which, (*own, E.coord_axis(row, k)), "i32"), found - 1)
    return (
        sort(at, inside, best, count, length),
        Map(where, (*rows, found), op.source, None, listed),
        sort(which, E.substitute_axes(op.key, {row: there}), k, found),
        Map(op.out, (*rows, k), op.source, None, E.load(where, (*own, chosen), "i32")),
    )


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
