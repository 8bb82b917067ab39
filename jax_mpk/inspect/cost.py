"""Costs from the graph and the boxes of its tasks: what a perfect device would have to do, not a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mpk.ir.graph import Attention, Contract, Graph, Op, Sort
from jax_mpk.ir.tasks import READ, WRITE, TaskGraph


@dataclass(frozen=True)
class OpCost:
    """Costs of one operator.

    flops: two per multiply-add of its core. scalar: work units of its fused expressions (an addition or a load is 1, a
    transcendental 8). read, written: distinct bytes. stream: the part of `read` that the function never writes.
    """

    name: str
    kind: str
    tasks: int
    flops: int
    scalar: int
    read: int
    written: int
    stream: int


@dataclass(frozen=True)
class Cost:
    """Costs of a function: per operator, and in total (`stream` counts each byte once)."""

    ops: tuple[OpCost, ...]
    flops: int
    scalar: int
    read: int
    written: int
    stream: int

    def __str__(self) -> str:
        head = ("operator", "kind", "tasks", "flops", "scalar", "read", "written", "stream")
        rows = [
            (o.name, o.kind, *map(size, (o.tasks, o.flops, o.scalar, o.read, o.written, o.stream))) for o in self.ops
        ]
        rows.append(("total", "", size(sum(o.tasks for o in self.ops)),
                     *map(size, (self.flops, self.scalar, self.read, self.written, self.stream))))  # fmt: skip
        width = [max(len(r[c]) for r in [head, *rows]) for c in range(len(head))]
        return "\n".join(
            "  ".join(
                x.ljust(w) if c < 2 else x.rjust(w) for c, (x, w) in enumerate(zip(r, width, strict=True))
            ).rstrip()
            for r in [head, *rows]
        )


def size(n: float) -> str:
    """A number in three digits: `17`, `4.19M`."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(n) < 1000 or unit == "T":
            return f"{n:.0f}{unit}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError


def plural(n: int, what: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def cost(graph: Graph, tg: TaskGraph) -> Cost:
    """The costs of a refined graph and its task graph."""
    keys = np.concatenate([np.stack([tg.boxes.buffer, tg.boxes.offset, tg.boxes.run], 1), tg.boxes.count,
                           tg.boxes.stride], 1)  # fmt: skip
    nbytes = tg.boxes.run * tg.boxes.count.prod(1)
    limit = np.array([b.nbytes for b in tg.buffers], np.int64)
    written_anywhere = {int(b) for b in np.unique(tg.boxes.buffer[tg.boxes.mode != READ])}
    streams = np.array([b.space == "arg" and b.id not in written_anywhere for b in tg.buffers], bool)

    def distinct(mask: np.ndarray) -> int:
        """Bytes of different boxes, at most the size of each buffer."""
        if not mask.any():
            return 0
        _, first = np.unique(keys[mask], axis=0, return_index=True)
        rows = np.flatnonzero(mask)[first]
        return int(np.minimum(np.bincount(tg.boxes.buffer[rows], nbytes[rows], len(limit)), limit).sum())

    grid_of = tg.grid_of[tg.boxes.task]
    reads, writes = tg.boxes.mode != WRITE, tg.boxes.mode != READ
    ops = []
    for n, g in enumerate(tg.grids):
        if g.op < 0:
            continue
        own = grid_of == n
        flops, scalar = _work(graph.ops[g.op])
        ops.append(OpCost(g.name, g.kind, g.count, flops, scalar, distinct(own & reads), distinct(own & writes),
                          distinct(own & streams[tg.boxes.buffer])))  # fmt: skip
    return Cost(tuple(ops), sum(o.flops for o in ops), sum(o.scalar for o in ops), sum(o.read for o in ops),
                sum(o.written for o in ops), distinct(streams[tg.boxes.buffer]))  # fmt: skip


def _work(op: Op) -> tuple[int, int]:
    points = math.prod(op.domain)
    exprs = op.exprs()
    if isinstance(op, Contract):
        k = math.prod(n for _, n in op.k)
        left = math.prod(op.domain[a] for a in (*op.axes("batch"), *op.axes("m"))) * k
        return 2 * points * k * len(op.rhs), int(exprs["lhs"].cost * left + exprs["epilogue"].cost * points)
    if isinstance(op, Attention):
        rows = math.prod(op.domain[a] for a in (*op.batch, *op.rows))
        scalar = rows * (exprs["q"].cost * op.head + (exprs["score"].cost + exprs["prob"].cost + 8) * op.keys)
        scalar += points * exprs["epilogue"].cost
        scalar += sum(math.prod(a.window) * a.expr.cost for a in op.appends)
        return 2 * rows * op.keys * (op.head + op.domain[op.column]), int(scalar)
    if isinstance(op, Sort):
        return 0, int(points * (exprs["key"].cost + math.log2(max(2, op.domain[-1]))))
    return 0, int(points * sum(e.cost for e in exprs.values()))
