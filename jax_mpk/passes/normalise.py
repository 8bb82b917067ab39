"""Normalisation: no task waits for, or triggers, more events than a task record holds.

A task that triggers too many events gets fewer in three steps, cheapest first: events that mix the tasks of its grid
with others are split (more waits, fewer distinct sets); events with consumers in one grid are merged into a coarser one
(only where every producer precedes every consumer in program order, so the order stays acyclic); and, as in the paper,
dummy tasks forward what is left. Too many waits are merged, then forwarded, in the same way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from jax_mpk.abi import MAX_TRIGGERS, MAX_WAITS
from jax_mpk.ir.boxes import ragged
from jax_mpk.ir.tasks import Csr, Grid, TaskGraph
from jax_mpk.passes.events import distinct, with_events


def run(tg: TaskGraph) -> TaskGraph:
    """`tg` with at most `MAX_WAITS` waits and `MAX_TRIGGERS` triggers a task."""
    assert tg.waits is not None and tg.triggers is not None
    if not len(_over(np.diff(tg.triggers.start), MAX_TRIGGERS)) and not len(_over(np.diff(tg.waits.start), MAX_WAITS)):
        return tg
    waits, sets = tg.waits, _transpose(tg.triggers, tg.events)
    for step in (_split, _merge, _forward):
        if len(_over(_triggers(tg, sets), MAX_TRIGGERS)) or len(_over(np.diff(waits.start), MAX_WAITS)):
            tg, waits, sets = step(tg, waits, sets)
            waits, sets = _tidy(waits, sets)
    return with_events(tg, waits, sets)


Events = tuple[TaskGraph, Csr, Csr]
"""A graph, the events that each of its tasks waits for, and the tasks that trigger each event."""


def _over(count: np.ndarray, limit: int) -> np.ndarray:
    return np.flatnonzero(count > limit)


def _triggers(tg: TaskGraph, sets: Csr) -> np.ndarray:
    """How many events each task triggers."""
    return np.bincount(sets.data, minlength=tg.tasks)


def _transpose(c: Csr, rows: int) -> Csr:
    return Csr.from_pairs(c.data, c.row_of(), rows)


def _tidy(waits: Csr, sets: Csr) -> tuple[Csr, Csr]:
    """One event per set of producers; no wait for a subset of what another wait covers; no event without a waiter."""
    which, sets = distinct(sets)
    waits = Csr.from_pairs(waits.row_of(), which[waits.data], waits.rows)
    row = waits.row_of()
    i, j = ragged(waits.start[row], waits.start[row + 1])  # every ordered pair of waits of one task
    drop = np.zeros(len(row), bool)
    drop[i[_inside(sets, waits.data[i], waits.data[j])]] = True
    used = np.zeros(sets.rows, bool)
    used[waits.data[~drop]] = True
    name = np.cumsum(used) - 1
    keep = used[sets.row_of()]
    sets = Csr.from_pairs(name[sets.row_of()[keep]], sets.data[keep], int(used.sum()))
    return Csr.from_pairs(row[~drop], name[waits.data[~drop]], waits.rows), sets


def _inside(sets: Csr, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether set a[n] is a proper subset of set b[n]. Sets are not empty, and no two are equal."""
    size, low, high = np.diff(sets.start), sets.data[sets.start[:-1]], sets.data[sets.start[1:] - 1]
    inside: np.ndarray = (size[a] < size[b]) & (low[a] >= low[b]) & (high[a] <= high[b])
    maybe = np.flatnonzero(inside)
    pair, at = ragged(sets.start[a[maybe]], sets.start[a[maybe] + 1])
    span = int(sets.data.max(initial=0)) + 1
    known = sets.row_of() * np.int64(span) + sets.data
    want = b[maybe][pair] * np.int64(span) + sets.data[at]
    missing = known[np.minimum(np.searchsorted(known, want), len(known) - 1)] != want
    inside[maybe[pair[missing]]] = False
    return inside


def _split(tg: TaskGraph, waits: Csr, sets: Csr) -> Events:
    """Splits events that mix a grid with too many triggers with other grids, where the waiting tasks have room."""
    busy = np.zeros(len(tg.grids), bool)
    busy[tg.grid_of[_over(_triggers(tg, sets), MAX_TRIGGERS)]] = True
    event, grid = sets.row_of().astype(np.int64), tg.grid_of[sets.data]
    part = np.where(busy[grid], grid + 1, 0)  # 0: all the other grids
    key, new = np.unique(event * (len(tg.grids) + 1) + part, return_inverse=True)
    old = key // (len(tg.grids) + 1)
    parts = np.bincount(old, minlength=sets.rows)  # pieces per event
    row = waits.row_of()
    total = np.bincount(row, parts[waits.data], tg.tasks)
    stays = np.zeros(sets.rows, bool)  # some waiting task has no room for the pieces
    stays[waits.data[total[row] > MAX_WAITS]] = True
    first = np.cumsum(parts) - parts
    new = np.where(stays[event], first[event], new.reshape(-1))
    n, at = ragged(first[waits.data], (first + np.where(stays, 1, parts))[waits.data])
    return tg, Csr.from_pairs(row[n], at, tg.tasks), Csr.from_pairs(new, sets.data, len(old))


def _merge(tg: TaskGraph, waits: Csr, sets: Csr) -> Events:
    """Merges events of one task that is over a limit and of one consumer grid, where that keeps program order."""
    waiting, triggers = _transpose(waits, sets.rows), _transpose(sets, tg.tasks)
    last = np.maximum.reduceat(sets.data, sets.start[:-1]).tolist()
    first = np.minimum.reduceat(waiting.data, waiting.start[:-1]).tolist()
    grid = tg.grid_of[first].tolist()
    group = list(range(sets.rows))

    def find(e: int) -> int:
        while group[e] != e:
            group[e] = e = group[group[e]]
        return e

    over = [triggers.row(t) for t in _over(np.diff(triggers.start), MAX_TRIGGERS)]
    over += [waits.row(t) for t in _over(np.diff(waits.start), MAX_WAITS)]
    seen: set[tuple[int, ...]] = set()
    for row in over:
        events = tuple(dict.fromkeys(find(e) for e in row.tolist()))
        if events in seen:
            continue
        seen.add(events)
        roots: dict[int, int] = {}
        for e in events:
            root = find(roots.setdefault(grid[e], e))
            if root != e and max(last[root], last[e]) < min(first[root], first[e]):
                group[e] = root
                last[root], first[root] = max(last[root], last[e]), min(first[root], first[e])
    event = np.array([find(e) for e in range(sets.rows)], np.int64)
    waits = Csr.from_pairs(waits.row_of(), event[waits.data], tg.tasks)
    return tg, waits, Csr.from_pairs(event[sets.row_of()], sets.data, sets.rows)


# ---------------------------------------------------------------------------------------------------------- dummy tasks


def _forward(tg: TaskGraph, waits: Csr, sets: Csr) -> Events:
    """Inserts dummy tasks: one that joins waits before a task, ones that fan out triggers behind a task."""
    # Edges of the bipartite graph as lists; the few tasks over a limit are rewired one by one.
    triggers = _transpose(sets, tg.tasks)
    wait_row, wait = waits.row_of().tolist(), waits.data.tolist()
    fire_row, fire = triggers.row_of().tolist(), triggers.data.tolist()
    events: int = sets.rows
    extra: list[tuple[int, int]] = []  # per dummy, the grid behind whose tasks it is numbered, and its task

    def dummy(behind: int, task: int) -> int:
        extra.append((behind, task))
        return tg.tasks + len(extra) - 1

    for t in _over(np.diff(triggers.start), MAX_TRIGGERS).tolist():
        lo, hi = int(triggers.start[t]), int(triggers.start[t + 1])
        relay, events = events, events + 1  # the event that wakes the dummies
        for n, at in enumerate(range(lo + MAX_TRIGGERS - 1, hi)):
            if n % MAX_TRIGGERS == 0:
                d = dummy(int(tg.grid_of[t]), t)
                wait_row.append(d)
                wait.append(relay)
            fire_row[at] = d
        fire_row.append(t)
        fire.append(relay)
    for t in _over(np.diff(waits.start), MAX_WAITS).tolist():
        todo = list(range(int(waits.start[t]), int(waits.start[t + 1])))
        while len(todo) > MAX_WAITS:
            d = dummy(int(tg.grid_of[t]) - 1, t)
            for at in todo[:MAX_WAITS]:
                wait_row[at] = d
            fire_row.append(d)
            fire.append(events)
            wait_row.append(t)
            wait.append(events)
            todo, events = [*todo[MAX_WAITS:], len(wait) - 1], events + 1
    number, tg = _insert(tg, extra)
    waits = Csr.from_pairs(number[np.array(wait_row)], np.array(wait), tg.tasks)
    return tg, waits, Csr.from_pairs(np.array(fire), number[np.array(fire_row)], events)


def _insert(tg: TaskGraph, extra: list[tuple[int, int]]) -> tuple[np.ndarray, TaskGraph]:
    """`tg` with dummy grids: old number (dummies behind the tasks) -> new number, and the graph renumbered.

    A dummy that forwards triggers depends on its task; one that joins waits takes over the dependencies of its task.
    """
    assert tg.deps is not None
    behind = np.array([g for g, _ in extra], np.int64)
    home = np.concatenate([tg.grid_of, behind])
    dummy = np.arange(len(home)) >= tg.tasks
    number = np.empty(len(home), np.int64)
    number[np.lexsort((np.arange(len(home)), dummy, home))] = np.arange(len(home))
    grids: list[Grid] = []
    units: list[Any] = []
    first = 0
    for g in range(-1, len(tg.grids)):
        if g >= 0:
            grids.append(replace(tg.grids[g], first=first))
            first += grids[-1].count
            units.append(tg.unit(g))
        count = int((behind == g).sum())
        if count:
            grids.append(Grid(-1, "nop", f"forward{len(grids)}", (count,), (1,), first, count))
            units.append(None)
            first += count
    sizes = np.array([g.count for g in grids], np.int64)
    grid_of = np.repeat(np.arange(len(grids), dtype=np.int32), sizes)
    index = (np.arange(len(home)) - np.repeat(np.cumsum(sizes) - sizes, sizes)).astype(np.int32)
    row, col = [number[tg.deps.row_of()]], [number[tg.deps.data]]
    for n, (g, t) in enumerate(extra):
        source = np.array([t]) if g == tg.grid_of[t] else tg.deps.row(t)
        row.append(np.full(len(source), number[tg.tasks + n]))
        col.append(number[source])
    deps = Csr.from_pairs(np.concatenate(row), np.concatenate(col), len(home))
    task = number[tg.boxes.task].astype(np.int32)
    boxes = replace(tg.boxes, task=task)  # tasks keep their order, so the rows stay sorted
    return number, replace(
        tg, grids=tuple(grids), units=tuple(units), grid_of=grid_of, index=index, boxes=boxes, deps=deps
    )
