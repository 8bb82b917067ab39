"""What a megakernel does: its operators as `Piece`s, from the graph that is cut into tasks."""

from __future__ import annotations

import math

from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir import traffic
from jax_mpk.ir.graph import Attention, Contract, Graph, Op, Sort, Update, itemsize
from jax_mpk.ir.loops import flatten, loop_axes
from jax_mpk.kinds import kind_of
from jax_mpk.passes.hops import hops
from jax_mpk.predict.piece import Piece


def pieces(graph: Graph, target: Device) -> tuple[Piece, ...]:
    """One piece an operator of a refined graph."""
    return tuple(_piece(graph, op, level, target) for op, level in zip(graph.ops, hops(graph), strict=True))


def _piece(graph: Graph, op: Op, level: int, target: Device) -> Piece:
    kind = kind_of(op)
    extent = {x.axis: x.extent for x in loop_axes(op)}
    extent |= dict(enumerate(op.domain))
    tile = kind.tile(graph, op, target)
    tasks = math.prod(math.ceil(extent[a] / t) for a, t in tile.items())
    core, _ = kind.work(op)
    scalar = _scalar(op, extent)
    how, rows = kind.name, 1
    if isinstance(op, Contract):
        dtypes = sorted({graph.values[r.value].dtype for r in op.rhs}, key=itemsize)  # type: ignore[attr-defined]
        how, rows = f"contract {dtypes[0]}", math.prod(op.domain[a] for a in op.axes("m"))
    elif isinstance(op, Attention):
        rows = math.prod(op.domain[a] for a in op.rows)
        how = f"attention {max((graph.values[x.value].dtype for e in (op.k, op.v) for x, _ in E.walk_loads(e)), key=itemsize)}"
    elif isinstance(op, Update):
        how = "update"
        if target.gpu and (steps := _one_by_one(op)) > 1:
            how, scalar = "update serial", steps * tasks
    elif isinstance(op, Sort):
        how = "top_k" if op.count < op.domain[-1] else "sort"
    elif _strided(graph, op):
        how = "strided"
    elif any(itemsize(graph.values[v].dtype) == 1 and graph.values[v].dtype != "bool" for v in op.reads()):
        how = "narrow"
    return Piece(how, graph.values[op.out].name or op.source.primitive, traffic.read(graph, op), traffic.written(graph, op), core // 2,
                 rows, scalar, tasks, level)  # fmt: skip


def _one_by_one(op: Update) -> int:
    """How many stores of a task follow each other, because they may be to one place."""
    apart = {t.axis for c in op.append.coords for t in c.terms}
    return math.prod(n for a, n in enumerate(op.domain) if a not in apart)


def _scalar(op: Op, extent: dict[int, int]) -> int:
    """Scalar work of the expressions. Every node is computed once for every point of the axes that it depends on: rows are
    reduced once, and what is shared is shared, where `Expr.cost` counts a tree."""
    total = 0.0
    core = ("rhs", "k", "v") if isinstance(op, Contract | Attention) else ()  # plain loads, which the core pays for
    for role, e in op.exprs().items():
        if role.rstrip("0123456789") in core:
            continue
        inner = dict(extent)
        for x in (e, *E.walk(e)):
            if isinstance(x, E.Reduce):
                inner |= dict(zip(x.bound, x.extents, strict=True))
        for x in (*E.walk(e), e):
            if isinstance(x, E.Reduce):
                total += math.prod(inner.get(a, 1) for a in x.body.axes)
            elif not isinstance(x, E.Const | E.Acc):
                own = x.cost - sum(a.cost for a in x.args()) if not isinstance(x, E.Piece) else 1
                total += max(1.0, own) * math.prod(inner.get(a, 1) for a in x.axes)
    return int(total) + kind_of(op).core(op)


def _strided(graph: Graph, op: Op) -> bool:
    """Whether the innermost loop (along the last axis, or of a reduction) goes through an operand in steps: its elements are then
    gathered one by one."""
    for e in op.exprs().values():
        reduced: set[E.Load] = set()
        for x in (e, *E.walk(e)):
            if isinstance(x, E.Reduce):
                inside = {y for y, _ in E.walk_loads(x.body)}
                if any(_steps(graph, y, x.bound[-1]) for y in inside):
                    return True
                reduced |= inside
        if any(_steps(graph, y, len(op.domain) - 1) for y, _ in E.walk_loads(e) if y not in reduced):
            return True
    return False


def _steps(graph: Graph, x: E.Load, axis: int) -> bool:
    return axis in x.axes and flatten(graph.values[x.value], x.coords).stride(axis) not in (0, 1)
