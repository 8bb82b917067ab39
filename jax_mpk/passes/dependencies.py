"""Dependencies: which tasks must finish before a task, from the overlap of their boxes.

Two tasks conflict when their boxes share a byte that at least one of them writes (read after write, write after read,
write after write); the later one in program order then depends on the earlier one. The result is transitively reduced:
an edge goes only if the remaining edges imply it, which is decided task by task with relation products and never by
the existence of a longer path between the operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from jax_mpk.ir.boxes import bytes_of, conflicts, ends, from_rows, rows_of, take
from jax_mpk.ir.tasks import READ, Boxes, Csr, TaskGraph
from jax_mpk.passes.relations import EMPTY, Reach, Relations


def run(tg: TaskGraph) -> TaskGraph:
    """`tg` with `deps`."""
    rel = Relations()
    direct = _direct(tg, rel)
    return replace(tg, deps=_csr(tg, _reduce(direct, rel), rel))


# ------------------------------------------------------------------------------------------------------------ conflicts


@dataclass(frozen=True)
class Access:
    """What the tasks of a grid do to one buffer. Equal contents are one object: `key` names it."""

    key: int
    tasks: int
    boxes: Boxes
    lo: int
    hi: int
    writes: bool
    covers: bool  # every byte of lo..hi is written


def _direct(tg: TaskGraph, rel: Relations) -> list[dict[int, int]]:
    """Per grid: earlier grid (or the grid itself) -> relation of direct conflicts.

    A conflict with a grid may be left out when a grid in between writes every byte that it is about.
    """
    out: list[dict[int, int]] = [{} for _ in tg.grids]
    memo: dict[tuple[int, int], int] = {}
    history: dict[int, list[tuple[int, Access]]] = {}
    for grid, buffer, b in accesses(tg):
        past = history.setdefault(buffer, [])
        if b.writes and b.tasks > 1:
            if (b.key, -1) not in memo:
                memo[b.key, -1] = rel.add(np.tril(overlap(b, b), -1))
            _join(out[grid], grid, memo[b.key, -1], rel)
        for earlier, a in reversed(past):
            if (a.writes or b.writes) and a.lo < b.hi and b.lo < a.hi:
                if (a.key, b.key) not in memo:
                    memo[a.key, b.key] = rel.add(overlap(a, b))
                _join(out[grid], earlier, memo[a.key, b.key], rel)
            if a.covers and a.lo <= b.lo and b.hi <= a.hi:
                break
        past.append((grid, b))
    return out


def _join(row: dict[int, int], grid: int, r: int, rel: Relations) -> None:
    if r != EMPTY:
        row[grid] = rel.union(row.get(grid, EMPTY), r)


def overlap(a: Access, b: Access) -> np.ndarray:
    m = np.zeros((b.tasks, a.tasks), bool)
    i, j = conflicts(a.boxes, b.boxes)
    m[b.boxes.task[j], a.boxes.task[i]] = True
    return m


def accesses(tg: TaskGraph) -> list[tuple[int, int, Access]]:
    """(grid, buffer, access) in program order, without the buffers that nobody writes."""
    written = np.zeros(len(tg.buffers), bool)
    written[tg.boxes.buffer[tg.boxes.mode != READ]] = True
    boxes = take(tg.boxes, np.flatnonzero(written[tg.boxes.buffer]))
    grid = tg.grid_of[boxes.task]
    group = grid.astype(np.int64) * len(tg.buffers) + boxes.buffer
    order = np.argsort(group, kind="stable")
    rows, group = rows_of(boxes)[order], group[order]
    rows[:, 0] = tg.index[rows[:, 0]]
    buffer, rows[:, 1] = rows[:, 1].copy(), 0
    bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)] if len(group) else [0]
    out: list[tuple[int, int, Access]] = []
    known: dict[tuple[int, bytes], Access] = {}
    for s, e in pairwise(bounds):
        g = int(group[s] // len(tg.buffers))
        key = (tg.grids[g].count, rows[s:e].tobytes())
        if key not in known:
            known[key] = _access(len(known), tg.grids[g].count, from_rows(rows[s:e]))
        out.append((g, int(buffer[s]), known[key]))
    return out


def _access(key: int, tasks: int, b: Boxes) -> Access:
    lo, hi = int(b.offset.min()), int(ends(b).max())
    w = take(b, b.mode != READ)
    covers = False
    if len(w) and int(w.offset.min()) == lo and int(bytes_of(w).sum()) == hi - lo:
        i, j = conflicts(w, w)
        covers = bool((i == j).all())  # disjoint boxes with as many bytes as the hull has
    return Access(key, tasks, b, lo, hi, len(w) > 0, covers)


# ------------------------------------------------------------------------------------------------- transitive reduction


def _reduce(direct: list[dict[int, int]], rel: Relations) -> list[dict[int, int]]:
    """Drops what other dependencies imply. Per grid: earlier grid (or the grid itself) -> relation."""
    kept: list[dict[int, int]] = []
    reach = Reach(rel)
    for b, edges in enumerate(direct):
        own = edges.get(b, EMPTY)
        chain = rel.plus(own)
        keep = {b: rel.minus(own, rel.product(own, chain))} if own != EMPTY else {}
        for a, r in edges.items():
            if a != b:
                implied = reach.indirect(a, b, edges)
                implied = rel.union(implied, rel.product(chain, rel.union(r, implied)))
                left = rel.minus(r, implied)
                if left != EMPTY:
                    keep[a] = left
        kept.append(keep)
        reach.push(keep)
    return kept


def _csr(tg: TaskGraph, kept: list[dict[int, int]], rel: Relations) -> Csr:
    """The dependencies as rows of tasks. Rows of equal grids in equal positions are computed once."""
    sizes, data = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    memo: dict[tuple[int, tuple[tuple[int, int], ...]], tuple[np.ndarray, np.ndarray]] = {}
    for b, edges in enumerate(kept):
        here = tg.grids[b]
        key = (here.count, tuple((edges[a], here.first - tg.grids[a].first) for a in sorted(edges)))
        if key not in memo:
            blocks = [(rel[r], back) for r, back in key[1]] or [(np.zeros((here.count, 0), bool), 0)]
            task = np.concatenate([np.arange(m.shape[1]) - back for m, back in blocks])
            row, col = np.nonzero(np.hstack([m for m, _ in blocks]))
            memo[key] = np.bincount(row, minlength=here.count), task[col].astype(np.int32)
        size, tasks = memo[key]
        sizes.append(size)
        data.append(tasks + np.int32(here.first))
    return Csr(np.cumsum(np.concatenate(sizes)), np.concatenate(data))
