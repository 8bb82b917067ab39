"""Which buffers must be looked at together because the memory plan gave them the same bytes?

Mostly none: where the events put every access to one buffer before every access to the next one in the same bytes,
each buffer can be proven alone. Only where a plan interleaves buffers at a finer grain are they merged into one memory.
"""

from __future__ import annotations

import numpy as np

from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.verify.boxes import Shapes
from jax_mpk.verify.events import Before


def memories(tg: TaskGraph, shape: Shapes, before: Before) -> tuple[np.ndarray, np.ndarray]:
    """Per buffer the memory that it is part of (named by one of its buffers), and the byte where it starts there."""
    memory, base = np.arange(len(tg.buffers)), np.zeros(len(tg.buffers), np.int64)
    offset = np.array([b.offset if b.space == "workspace" else -1 for b in tg.buffers], np.int64)
    rows = np.flatnonzero(offset[tg.boxes.buffer] >= 0)
    if not len(rows):
        return memory, base
    buffer, task = tg.boxes.buffer[rows], tg.boxes.task[rows]
    used, first_row = np.unique(buffer, return_index=True)  # rows are sorted by task
    first, last = np.zeros(len(tg.buffers), np.int64), np.zeros(len(tg.buffers), np.int64)
    first[used] = task[first_row]
    np.maximum.at(last, buffer, task)
    lo, hi = np.full(len(tg.buffers), np.iinfo(np.int64).max), np.zeros(len(tg.buffers), np.int64)
    np.minimum.at(lo, buffer, offset[buffer] + shape.offset[rows])
    np.maximum.at(hi, buffer, offset[buffer] + shape.end[rows])
    fires = _classes(buffer, before.trigger[task], len(tg.buffers))
    awaits = _classes(buffer, before.wait[task], len(tg.buffers))

    # Successive users of each byte. If each user is done before the next one starts, so are all users before it.
    cuts = np.unique(np.concatenate([lo[used], hi[used]]))
    owner = np.full(len(cuts), -1)
    parent, broken = list(range(len(tg.buffers))), []
    for b in used[np.argsort(first[used], kind="stable")].tolist():
        here = slice(*np.searchsorted(cuts, (lo[b], hi[b])))
        for a in set(owner[here].tolist()) - {-1}:
            if not (last[a] < first[b] and before.separates(fires[a], awaits[b])):
                broken.append(a)
            parent[_root(parent, a)] = _root(parent, b)
        owner[here] = b
    if broken:
        broken_roots = {_root(parent, a) for a in broken}
        for b in used.tolist():
            if _root(parent, b) in broken_roots:
                memory[b], base[b] = _root(parent, b), offset[b]
    return memory, base


def _root(parent: list[int], a: int) -> int:
    while parent[a] != a:
        parent[a] = a = parent[parent[a]]
    return a


def _classes(buffer: np.ndarray, of: np.ndarray, buffers: int) -> list[np.ndarray]:
    """The distinct classes of the tasks that use each buffer."""
    n = int(of.max()) + 1
    key = np.unique(buffer.astype(np.int64) * n + of)
    return np.split(key % n, np.searchsorted(key // n, np.arange(1, buffers)))
