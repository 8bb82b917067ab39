"""Bytes that an operator reads and writes, by its loads and stores: what may be anywhere counts once."""

from __future__ import annotations

import math

from jax_mpk.ir import expr as E
from jax_mpk.ir.graph import Attention, Graph, Op, itemsize
from jax_mpk.ir.loops import loop_axes


def read(graph: Graph, op: Op) -> int:
    """Distinct bytes: of every value as many elements as its loads have points, at most all. A gather reads what it
    gathers, although it could be anywhere."""
    extent = {x.axis: x.extent for x in loop_axes(op)} | dict(enumerate(op.domain))
    total: dict[int, int] = {}
    for e in op.exprs().values():
        inner = dict(extent)
        for x in E.walk(e):
            if isinstance(x, E.Reduce):
                inner |= dict(zip(x.bound, x.extents, strict=True))
        for x, _ in E.walk_loads(e):
            total[x.value] = total.get(x.value, 0) + math.prod(inner.get(a, 1) for a in x.axes)
    return sum(min(graph.values[v].nbytes, n * itemsize(graph.values[v].dtype)) for v, n in total.items())


def written(graph: Graph, op: Op) -> int:
    """Bytes that the operator stores: its result, or the windows that it updates."""
    stored = {op.out: math.prod(op.domain)}
    if isinstance(op, Attention):
        stored |= {a.out: math.prod(a.window) for a in op.appends}
    return sum(min(graph.values[v].nbytes, n * itemsize(graph.values[v].dtype)) for v, n in stored.items())
