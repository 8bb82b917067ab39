"""Costs from the graph and the boxes of its tasks: what a perfect device would have to do, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mpk.inspect.text import size, table
from jax_mpk.ir import traffic
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.tasks import READ, WRITE, TaskGraph
from jax_mpk.kinds import kind_of


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
        return table([head, *rows], left=(0, 1))


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
        op = graph.ops[g.op]
        flops, scalar = kind_of(op).work(op)
        most = traffic.read(graph, op)  # a box of what may be anywhere is all of it
        ops.append(OpCost(g.name, g.kind, g.count, flops, scalar, min(distinct(own & reads), most),
                          min(distinct(own & writes), traffic.written(graph, op)),
                          min(distinct(own & streams[tg.boxes.buffer]), most)))  # fmt: skip
    return Cost(tuple(ops), sum(o.flops for o in ops), sum(o.scalar for o in ops), sum(o.read for o in ops),
                sum(o.written for o in ops), min(distinct(streams[tg.boxes.buffer]), sum(o.stream for o in ops)))  # fmt: skip
