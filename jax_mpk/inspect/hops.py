"""Task graphs at the level of operators: who waits for whom, because of which buffer, and how deep that makes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mpk.ir.tasks import READ, TaskGraph


@dataclass(frozen=True)
class Edge:
    """Grid `consumer` waits for grid `producer`: `events` counters connect them, `why` names the memory behind it."""

    producer: int
    consumer: int
    events: int
    why: str


def edges(tg: TaskGraph) -> list[Edge]:
    """The edges between the grids of a task graph that has its events, sorted by consumer, then producer."""
    assert tg.waits is not None and tg.triggers is not None
    grids = len(tg.grids)
    # (event, grid) pairs on either side of each event, without repetitions
    produced = np.unique(tg.triggers.data.astype(np.int64) * grids + tg.grid_of[tg.triggers.row_of()])
    awaited = np.unique(tg.waits.data.astype(np.int64) * grids + tg.grid_of[tg.waits.row_of()])
    counts: dict[tuple[int, int], int] = {}
    sources: dict[int, list[int]] = {}
    for x in produced.tolist():
        sources.setdefault(x // grids, []).append(x % grids)
    for x in awaited.tolist():
        for p in sources.get(x // grids, ()):
            counts[x % grids, p] = counts.get((x % grids, p), 0) + 1
    touched = _touched(tg)
    return [Edge(p, c, n, _why(tg, touched, p, c)) for (c, p), n in sorted(counts.items())]


def levels(tg: TaskGraph, links: list[Edge]) -> list[int]:
    """Per grid the number of its hop, from 1: one more than the deepest grid that it waits for."""
    before: dict[int, list[int]] = {}
    for e in links:
        if e.producer != e.consumer:
            before.setdefault(e.consumer, []).append(e.producer)
    level = [0] * len(tg.grids)
    for n in sorted(range(len(tg.grids)), key=lambda n: tg.grids[n].first):  # program order
        level[n] = 1 + max((level[p] for p in before.get(n, ())), default=0)
    return level


def _touched(tg: TaskGraph) -> list[tuple[set[int], set[int]]]:
    """Per grid, the buffers that it reads and those that it writes (an update does both)."""
    out: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in tg.grids]
    rows = np.unique(np.stack([tg.grid_of[tg.boxes.task], tg.boxes.buffer, tg.boxes.mode.astype(np.int32)]), axis=1)
    for g, b, mode in rows.T.tolist():
        out[g][0 if mode == READ else 1].add(b)
        if mode > 1:
            out[g][0].add(b)
    return out


def _why(tg: TaskGraph, touched: list[tuple[set[int], set[int]]], p: int, c: int) -> str:
    (p_reads, p_writes), (c_reads, c_writes) = touched[p], touched[c]
    reasons = []
    for verb, shared in (("reads", p_writes & c_reads), ("overwrites", (p_reads | p_writes) & c_writes - c_reads)):
        if shared:
            reasons.append(f"{verb} {', '.join(tg.buffers[b].name for b in sorted(shared))}")
    return " and ".join(reasons) or "is ordered after it through other tasks"
