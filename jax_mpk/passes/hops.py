"""Depth: the hops of an op graph, the levels and the critical path of a task graph."""

from __future__ import annotations

import numpy as np

from jax_mpk.ir.boxes import ragged
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.tasks import TaskGraph


def hops(graph: Graph) -> tuple[int, ...]:
    """The level of every operator: 0 if it reads operands and constants only, else one more than its producers'."""
    level: dict[int, int] = {}
    out = []
    for op in graph.ops:
        n = max((level[v] + 1 for v in op.reads() if v in level), default=0)
        level |= dict.fromkeys(op.writes(), n)
        out.append(n)
    return tuple(out)


def levels(tg: TaskGraph) -> np.ndarray:
    """The level of every task: the longest chain of events that leads to it. Raises `ValueError` for a cycle."""
    assert tg.waits is not None and tg.triggers is not None and tg.threshold is not None
    level = np.full(tg.tasks, -1, np.int32)
    need = np.diff(tg.waits.start).copy()
    left = tg.threshold.astype(np.int64)
    order = np.argsort(tg.waits.data, kind="stable")
    waiter = tg.waits.row_of()[order]  # per event, who waits
    start = np.searchsorted(tg.waits.data[order], np.arange(tg.events + 1))
    ready, n = np.flatnonzero(need == 0), 0
    while len(ready):
        level[ready] = n
        _, at = ragged(tg.triggers.start[ready], tg.triggers.start[ready + 1])
        hit, times = np.unique(tg.triggers.data[at], return_counts=True)
        left[hit] -= times
        fired = hit[left[hit] == 0]
        _, at = ragged(start[fired], start[fired + 1])
        hit, times = np.unique(waiter[at], return_counts=True)
        need[hit] -= times
        ready, n = hit[need[hit] == 0], n + 1
    if tg.tasks and level.min() < 0:
        raise ValueError(f"the events form a cycle through {tg.task_name(int(np.argmin(level)))}")
    return level


def critical_path(tg: TaskGraph) -> int:
    """Tasks on the longest chain of events."""
    return int(levels(tg).max(initial=-1)) + 1
