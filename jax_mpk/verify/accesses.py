"""The accesses to memory, grouped so that a handful of comparisons stand for many pairs of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_mpk.ir.tasks import READ, TaskGraph
from jax_mpk.verify.boxes import Shapes, distinct, overlaps, ragged
from jax_mpk.verify.events import Before

LOT = 1024
"""Pieces of boxes in memories that are compared together."""


@dataclass(frozen=True)
class Accesses:
    """Accesses grouped so that a group is checked at once, sorted by cell.

    A *cell* is one box of one buffer in one mode; a group is either one task that writes it, or all tasks that read it
    and are in the same wait and trigger class (`first` and `last` of them in program order: events order all of them
    in the same way, so a writer between the two is always an error).
    """

    row: np.ndarray  # a row of the box table, per cell
    memory: np.ndarray  # per cell
    mode: np.ndarray  # per cell
    buffer: np.ndarray  # per cell
    shape: Shapes  # per cell, bytes of the memory
    cell: np.ndarray  # per group
    first: np.ndarray  # per group
    last: np.ndarray  # per group
    box: np.ndarray  # per cell: equal numbers are equal boxes and modes


def collect(tg: TaskGraph, shape: Shapes, before: Before, written: np.ndarray, memory: np.ndarray,
            base: np.ndarray) -> Accesses:  # fmt: skip
    """Group the accesses to all `written` buffers; the others only ever hold what they were given."""
    x = tg.boxes
    rows = np.flatnonzero(written[x.buffer])
    buffer, task, mode = x.buffer[rows], x.task[rows].astype(np.int64), x.mode[rows]
    at = shape[rows]
    at.offset[:] += base[buffer]
    merged = np.bincount(memory, minlength=len(memory)) > 1
    tag = np.where(merged[memory[buffer]], buffer, -1)  # in a shared memory a box belongs to its buffer
    first, box = distinct([tag, mode, *at.columns()])
    key, cell_row, cell = np.unique(memory[buffer] * max(1, len(first)) + box, return_index=True, return_inverse=True)
    kinds, kind = distinct([before.wait, before.trigger])
    who = np.where(mode == READ, kind[task], len(kinds) + task)
    span = len(kinds) + tg.tasks
    group_key, group_row, group = np.unique(cell * span + who, return_index=True, return_inverse=True)
    last = np.zeros(len(group_key), np.int64)
    last[group] = task  # rows are sorted by task: the last assignment stays
    return Accesses(rows[cell_row], memory[buffer[cell_row]], mode[cell_row], buffer[cell_row], at[cell_row],
                    group_key // span, task[group_row], last, key % max(1, len(first)))  # fmt: skip


def overlapping_cells(acc: Accesses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of overlapping cells, the first one a write, and how many bytes they share.

    Layers repeat: memories with equal sets of boxes are compared once. Small memories are compared together, laid out
    one after the other in one address space.
    """
    bounds = np.flatnonzero(np.diff(acc.memory, prepend=-1, append=-1)).tolist()
    spans = list(pairwise(bounds))
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
    parts = [(i + a, j + a, size) for (a, _), (i, j, size) in zip(spans, map(known.get, keys), strict=True)]
    if not parts:
        return (np.zeros(0, np.int64),) * 3
    return tuple(np.concatenate(c) for c in zip(*parts, strict=True))


def _compare(acc: Accesses, spans: list[tuple[int, int]]) -> list[tuple[np.ndarray, ...]]:
    """Overlaps within each of these ranges of cells, numbered from the start of the range."""
    cells = np.concatenate([np.arange(a, b) for a, b in spans])
    n = np.array([b - a for a, b in spans])
    shape, start = acc.shape[cells], np.cumsum(n) - n
    extent = np.maximum.reduceat(shape.end, start)
    shape.offset[:] += np.repeat(np.cumsum(extent) - extent, n)
    i, j, size = overlaps(shape, acc.mode[cells] != READ)
    at = [*np.searchsorted(i, start).tolist(), len(i)]  # pairs are sorted
    return [(i[p:q] - s, j[p:q] - s, size[p:q]) for p, q, s in zip(at[:-1], at[1:], start.tolist(), strict=True)]


def group_pairs(acc: Accesses, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of groups of overlapping cells, and the pair of cells that it comes from."""
    start = np.searchsorted(acc.cell, np.arange(len(acc.row) + 1))
    groups = np.diff(start)
    pair, n = ragged(groups[i] * groups[j])
    g, h = start[i][pair] + n // groups[j][pair], start[j][pair] + n % groups[j][pair]
    keep = (i != j)[pair] | (g < h)
    return g[keep], h[keep], pair[keep]
