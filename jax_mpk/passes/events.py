"""Event fusion: dependencies become counters.

Starting from one event for every dependency, successor-set fusion (events that the same tasks wait for become one) and
predecessor-set fusion (events that the same tasks trigger become one) leave exactly one event for every distinct set of
producers. A task waits for the event of its set.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mpk.ir.boxes import ragged
from jax_mpk.ir.tasks import Csr, TaskGraph


def run(tg: TaskGraph) -> TaskGraph:
    """`tg` with `waits`, `triggers` and `threshold`. Events are numbered by their first waiting task."""
    assert tg.deps is not None
    event, sets = distinct(tg.deps)
    has = event >= 0
    waits = Csr(np.concatenate([[0], np.cumsum(has)]), event[has])
    return with_events(tg, waits, sets)


def with_events(tg: TaskGraph, waits: Csr, producers: Csr) -> TaskGraph:
    """`tg` with these waits and, per event, these producers."""
    triggers = Csr.from_pairs(producers.data, producers.row_of(), tg.tasks)
    return replace(tg, waits=waits, triggers=triggers, threshold=np.diff(producers.start).astype(np.int32))


def distinct(rows: Csr) -> tuple[np.ndarray, Csr]:
    """The number of each row's set (-1: empty) in order of first appearance, and the sets. Rows are sorted."""
    size = np.diff(rows.start)
    full = np.flatnonzero(size)
    which = np.full(rows.rows, -1, np.int32)
    if not len(full):
        return which, Csr.empty(0)
    values = np.arange(int(rows.data.max()) + 1, dtype=np.uint64)
    code = np.add.reduceat(_mix(values)[rows.data], rows.start[full])
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    sample = full[first]
    owner = sample[group.reshape(-1)]  # the row that stands for each row
    same = size[owner] == size[full]
    if same.all():
        _, there = ragged(rows.start[owner], rows.start[owner] + size[full])
        same = np.equal(rows.data[there], rows.data[rows.start[full[0]] :])
    if not same.all():  # two sets with one hash: compare the rows themselves
        table: dict[bytes, int] = {}
        owner = np.array([table.setdefault(rows.row(r).tobytes(), r) for r in full.tolist()])
        sample = np.unique(owner)
    sample = np.sort(sample)
    which[full] = np.searchsorted(sample, owner)
    _, at = ragged(rows.start[sample], rows.start[sample] + size[sample])
    start = np.concatenate([[0], np.cumsum(size[sample])])
    return which, Csr(start, rows.data[at])


def _mix(x: np.ndarray) -> np.ndarray:
    """Well-mixed 64-bit numbers (the finaliser of splitmix64), so that sums of a few tell sets apart."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x
