"""The accesses to memory, grouped so that a handful of comparisons stand for many pairs of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_mpk.ir.tasks import READ, TaskGraph
from jax_mpk.verify.boxes import Shapes, crossings, distinct, overlaps, ragged
from jax_mpk.verify.events import Before

LOT = 1024
"""Pieces of boxes in buffers that are compared together."""


@dataclass(frozen=True)
class Accesses:
    """Accesses grouped so that a group is checked at once, sorted by cell.

    A *cell* is one box of one buffer in one mode; a group is either one task that writes it, or all tasks that read it
    and are in the same wait and trigger class (`first` and `last` of them in program order: events order all of them
    in the same way, so a writer between the two is always an error).
    """

    row: np.ndarray  # a row of the box table, per cell
    mode: np.ndarray  # per cell
    buffer: np.ndarray  # per cell, ascending
    shape: Shapes  # per cell, bytes of the buffer
    cell: np.ndarray  # per group
    first: np.ndarray  # per group
    last: np.ndarray  # per group
    box: np.ndarray  # per cell: equal numbers are equal boxes and modes
    base: np.ndarray  # per buffer: where it starts in the workspace, -1 elsewhere

    def ranges(self) -> list[tuple[int, int]]:
        """The cells of every buffer that has some: `start, end`."""
        return list(pairwise(np.flatnonzero(np.diff(self.buffer, prepend=-1, append=-1)).tolist()))

    def groups(self) -> np.ndarray:
        """The first group of every cell, and the number of groups."""
        return np.searchsorted(self.cell, np.arange(len(self.row) + 1))


def collect(tg: TaskGraph, shape: Shapes, before: Before, written: np.ndarray) -> Accesses:
    """Group the accesses to all `written` buffers; the others only ever hold what they were given."""
    x = tg.boxes
    rows = np.flatnonzero(written[x.buffer])
    buffer, task, mode = x.buffer[rows].astype(np.int64), x.task[rows].astype(np.int64), x.mode[rows]
    at = shape[rows]
    first, box = distinct([mode, *at.columns()])
    key, cell_row, cell = np.unique(buffer * max(1, len(first)) + box, return_index=True, return_inverse=True)
    kinds, kind = distinct([before.wait, before.trigger])
    who = np.where(mode == READ, kind[task], len(kinds) + task)
    span = len(kinds) + tg.tasks
    group_key, group_row, group = np.unique(cell * span + who, return_index=True, return_inverse=True)
    last = np.zeros(len(group_key), np.int64)
    last[group] = task  # rows are sorted by task: the last assignment stays
    base = np.array([b.offset if b.space == "workspace" else -1 for b in tg.buffers], np.int64)
    return Accesses(rows[cell_row], mode[cell_row], buffer[cell_row], at[cell_row], group_key // span, task[group_row],
                    last, key % max(1, len(first)), base)  # fmt: skip


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Two cells that overlap, the first one a write, and how many bytes they share."""


def _all(parts: list[Pairs]) -> Pairs:
    if not parts:
        return (np.zeros(0, np.int64),) * 3
    i, j, size = (np.concatenate(c) for c in zip(*parts, strict=True))
    return i, j, size


def within(acc: Accesses) -> Pairs:
    """Overlapping cells of one buffer.

    Layers repeat: buffers with equal sets of boxes are compared once. Small buffers are compared together, laid out
    one after the other in one address space.
    """
    spans = acc.ranges()
    keys = [acc.box[a:b].tobytes() for a, b in spans]
    pieces = np.concatenate([[0], np.cumsum(acc.shape.count.prod(1))])
    lots: list[list[bytes]] = []
    kinds, room = dict(zip(keys, spans, strict=True)), 0
    for key, (a, b) in kinds.items():
        room -= int(pieces[b] - pieces[a])
        if room < 0:
            lots.append([])
            room = LOT - int(pieces[b] - pieces[a])
        lots[-1].append(key)
    known = {key: pairs for lot in lots for key, pairs in zip(lot, _compare(acc, [kinds[k] for k in lot]), strict=True)}
    return _all([(i + a, j + a, size) for (a, _), (i, j, size) in zip(spans, (known[k] for k in keys), strict=True)])


def _compare(acc: Accesses, spans: list[tuple[int, int]]) -> list[Pairs]:
    """Overlaps within each of these ranges of cells, numbered from the start of the range."""
    cells = np.concatenate([np.arange(a, b) for a, b in spans])
    n = np.array([b - a for a, b in spans])
    shape, start = acc.shape[cells], np.cumsum(n) - n
    extent = np.maximum.reduceat(shape.end, start)
    shape.offset[:] += np.repeat(np.cumsum(extent) - extent, n)
    i, j, size = overlaps(shape, acc.mode[cells] != READ)
    at = [*np.searchsorted(i, start).tolist(), len(i)]  # pairs are sorted
    return [(i[p:q] - s, j[p:q] - s, size[p:q]) for p, q, s in zip(at[:-1], at[1:], start.tolist(), strict=True)]


def across(acc: Accesses, meetings: list[tuple[int, int]]) -> Pairs:
    """Overlapping cells of two buffers that share bytes of the workspace, for these pairs of buffers.

    Layers repeat here, too: two buffers with the same boxes at the same distance are compared once.
    """
    span = {int(acc.buffer[a]): (a, b) for a, b in acc.ranges()}
    known: dict[tuple[bytes, bytes, int], Pairs] = {}
    parts: list[Pairs] = []
    for x, y in meetings:
        (a, b), (c, d) = span[x], span[y]
        key = (acc.box[a:b].tobytes(), acc.box[c:d].tobytes(), int(acc.base[y] - acc.base[x]))
        if key not in known:
            ours, theirs = placed(acc, [(a, b), (c, d)])
            known[key] = crossings(ours, theirs, acc.mode[a:b] != READ, acc.mode[c:d] != READ)
        i, j, size = known[key]
        i, j, swap = i + a, j + c, acc.mode[i + a] == READ
        parts.append((np.where(swap, j, i), np.where(swap, i, j), size))
    return _all(parts)


def placed(acc: Accesses, spans: list[tuple[int, int]]) -> list[Shapes]:
    """The boxes of ranges of cells, in bytes of the workspace."""
    shapes = [acc.shape[np.arange(a, b)] for a, b in spans]
    for x, (a, b) in zip(shapes, spans, strict=True):
        x.offset[:] += acc.base[acc.buffer[a:b]]
    return shapes


def group_pairs(acc: Accesses, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of groups of overlapping cells, and the pair of cells that it comes from."""
    start = acc.groups()
    groups = np.diff(start)
    pair, n = ragged(groups[i] * groups[j])
    g, h = start[i][pair] + n // groups[j][pair], start[j][pair] + n % groups[j][pair]
    keep = (i != j)[pair] | (g < h)
    return g[keep], h[keep], pair[keep]
