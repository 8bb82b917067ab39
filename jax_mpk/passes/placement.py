"""Placement: which worker runs a task, and the weight streams.

Every operator is dealt to the workers in contiguous runs of tasks with equal bytes; who got more than the others last
time gets less the next time, so remainders rotate. The assignment is a proposal: any other one is correct too.

On a target that streams weights, the operators of one level (Q, K and V) are dealt as one, because the next level waits for
all of them, and what a worker got too much of before decides only between workers that are level now. Tasks of a level with
equal prologues go to one worker where that costs no balance: it computes the prologue once (`prologue` in `jax_mpk.abi`).

The frames of stream operands are listed in the order of consumption, so that a loader can run ahead of every event. What
has to be even on a GPU is that stream: frames count there, and not the activations, which come from a cache.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np

from jax_mpk.device import Device
from jax_mpk.ir.boxes import bytes_of
from jax_mpk.ir.graph import Contract, Graph
from jax_mpk.ir.tasks import READ, WRITE, Csr, Streams, TaskGraph, TensorMap
from jax_mpk.kinds.contract.stream import RANK, Operand, entries, operands
from jax_mpk.passes.decompose import buffer_of
from jax_mpk.passes.hops import levels

WINDOW = 8
"""Operators over which uneven work is remembered."""


def run(tg: TaskGraph, graph: Graph, target: Device, workers: int | None = None) -> TaskGraph:
    """`tg` with `workers`, `worker`, `maps` and `streams`."""
    workers = target.workers if workers is None else workers
    if not target.gpu:
        return replace(tg, workers=workers, worker=_workers(tg, _cost(tg), None, workers))
    frames, tables = _frames(tg, target)
    cost = np.where(frames > 0, frames * target.frame, _cost(tg, split=True))
    worker = _workers(tg, cost, _prologues(tg), workers)
    maps, streams = _streams(tg, graph, tables)
    return replace(tg, workers=workers, worker=worker, maps=maps, streams=streams, shares=_shares(tg, worker, workers))


def _shares(tg: TaskGraph, worker: np.ndarray, workers: int) -> Csr:
    """The workers of every task, part by part: the parts of split tasks go round, each operator starting where the last
    one stopped, in linear order."""
    assert tg.order is not None
    count = np.array([getattr(getattr(u, "variant", None), "parts", 1) for u in tg.units], np.int64)
    parts = np.append(count, np.ones(len(tg.grids) - len(count), np.int64))[tg.grid_of]
    start = np.zeros(tg.tasks + 1, np.int64)
    np.cumsum(parts, out=start[1:])
    data = np.repeat(worker, parts)
    at = 0
    for t in tg.order[parts[tg.order] > 1]:
        data[start[t] : start[t + 1]] = (at + np.arange(parts[t])) % workers
        at += int(parts[t])
    return Csr(start, data.astype(np.int32))


# ------------------------------------------------------------------------------------------------------------- workers


def _workers(tg: TaskGraph, cost: np.ndarray, same: np.ndarray | None, workers: int) -> np.ndarray:
    """The worker of every task; `same` numbers the prologues where the target streams."""
    worker = np.zeros(tg.tasks, np.int32)
    if workers == 1 or not tg.tasks:
        return worker
    assert tg.order is not None and tg.deps is not None
    level = levels(tg)
    order = np.lexsort((tg.grid_of, level))  # operators of one level one after the other
    cuts = np.flatnonzero(np.diff(level[order]) | np.diff(tg.grid_of[order])) + 1
    load = own = np.zeros(workers)  # what a worker got too much of, and what it has of this level
    held, now = np.full(workers, -1), -1  # the prologue of its last task
    recent: deque[float] = deque(maxlen=WINDOW)
    for tasks in np.split(order, cuts):
        if level[tasks[0]] != now:
            now, own, held = level[tasks[0]], np.zeros(workers), np.full(workers, -1)
        c = cost[tasks]
        recent.append(c.max())
        load = load - load.min()
        if same is None:
            load = np.minimum(load, max(recent))  # what was uneven lately
        if len(tasks) < workers or same is not None and len(tasks) == workers:
            needs = tg.deps.row(tasks[0])
            near = worker[needs[-1]] if len(needs) else 0
            pick = np.sort(np.lexsort((np.arange(workers) != near, load, own))[: len(tasks)])
            worker[tasks] = pick
        else:
            # A worker makes up for what it had too little of, by a task at most, and where a level waits for the busiest
            # one, by none that would make it busier than the fewest turns allow.
            size = c if same is None else np.full(len(c), c.max())
            spare = c.max() if same is None else size[0] * math.ceil(len(c) / workers) - size.sum() / workers
            quota = _quota(np.minimum(load, spare), size.sum())
            middle = np.cumsum(size) - size / 2
            worker[tasks] = np.minimum(np.searchsorted(np.cumsum(quota), middle, "right"), workers - 1)
        if same is not None:
            beside = _beside(same[tasks], held, own, load)
            if beside is not None and _with(own, beside, c).max() <= _with(own, worker[tasks], c).max():
                worker[tasks] = beside
            own, held[worker[tasks]] = _with(own, worker[tasks], c), same[tasks]
        load = _with(load, worker[tasks], c)
    return worker


def _with(load: np.ndarray, worker: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """`load` and the cost of tasks on these workers."""
    return load + np.bincount(worker, cost, len(load))


def _beside(same: np.ndarray, held: np.ndarray, own: np.ndarray, load: np.ndarray) -> np.ndarray | None:
    """Tasks on workers that hold their prologues, the least busy first; None if some prologue is held by nobody."""
    if same[0] < 0 or not np.isin(same, held).all():
        return None
    out = np.empty(len(same), np.int32)
    for p in np.unique(same):
        holders, tasks = np.flatnonzero(held == p), np.flatnonzero(same == p)
        holders = holders[np.lexsort((load[holders], own[holders]))]
        out[tasks] = holders[np.arange(len(tasks)) % len(holders)]
    return out


def _prologues(tg: TaskGraph) -> np.ndarray:
    """A number per task, -1 if it has no prologue: equal numbers, equal activations (prologue, slice and rows)."""
    out = np.full(tg.tasks, -1, np.int64)
    number: dict[int, int] = {}
    used = 0
    for grid, unit in zip(tg.grids, tg.units, strict=False):
        if unit is None or not unit.prologue:
            continue
        parts = [math.ceil(e / t) for e, t in zip(grid.extent, grid.tile, strict=True)]
        flat, size = np.zeros(grid.count, np.int64), 1
        digits = np.unravel_index(np.arange(grid.count), parts)
        for x, n, digit in zip(unit.bound.axes, parts, digits, strict=True):
            if x.role != "n":
                flat, size = flat * n + digit, size * n
        first = number.setdefault(unit.prologue, used)
        used = max(used, first + size)
        out[grid.first : grid.first + grid.count] = first + flat
    return out


def _cost(tg: TaskGraph, split: bool = False) -> np.ndarray:
    """Bytes that a task moves: what cores read, and writes. The read box of a gather says nothing about its size. `split`:
    an attention is shared by all workers."""
    core = np.array([g.kind in ("contract", "sort") or (g.kind == "attention" and not split) for g in tg.grids], bool)
    count = (tg.boxes.mode == WRITE) | ((tg.boxes.mode == READ) & core[tg.grid_of[tg.boxes.task]])
    return np.maximum(np.bincount(tg.boxes.task, np.where(count, bytes_of(tg.boxes), 0), tg.tasks), 1.0)


def _quota(load: np.ndarray, total: float) -> np.ndarray:
    """How much of `total` each worker takes so that all end level: the water that fills the vessel `load`."""
    low = np.sort(load)
    need = low * np.arange(1, len(low) + 1) - np.cumsum(low)  # to raise the n lowest to the n-th
    n = int(np.searchsorted(need, total, "right"))
    out: np.ndarray = np.maximum((total + low[:n].sum()) / n - load, 0)
    return out


# ------------------------------------------------------------------------------------------------------------- streams


def _frames(tg: TaskGraph, target: Device) -> tuple[np.ndarray, list[tuple[int, Operand, np.ndarray]]]:
    """Frames of every task, were all that can be streamed; and (grid, operand, entries) of the right sides."""
    frames, tables = np.zeros(tg.tasks, np.int64), []
    for n, (grid, unit) in enumerate(zip(tg.grids, tg.units, strict=False)):
        if unit is None or not isinstance(unit.bound.op, Contract):
            continue
        found = operands(unit.bound, target, unit.fixed) or []
        for j, x in enumerate(found):
            table = entries(grid, unit.bound, x)
            table[:, 1] = table[:, 1] * len(found) + j
            frames += np.bincount(table[:, 0], table[:, 3], tg.tasks).astype(np.int64)
            tables.append((n, x, table))
    return frames, tables


def _streams(
    tg: TaskGraph, graph: Graph, tables: list[tuple[int, Operand, np.ndarray]]
) -> tuple[tuple[TensorMap, ...], Streams]:
    """The entries of the operators that are streamed, in the order in which a worker consumes them."""
    assert tg.order is not None
    buffer = buffer_of(graph)
    maps: dict[TensorMap, int] = {}
    out = [np.zeros((0, 4 + 2 * RANK), np.int64)]
    for n, x, table in tables:
        if tg.units[n].variant.streamed:
            table[:, 2] = maps.setdefault(x.map(buffer[x.value], graph.values[x.value].dtype), len(maps))
            out.append(table)
    table = np.concatenate(out)
    place = np.empty(tg.tasks, np.int64)
    place[tg.order] = np.arange(tg.tasks)
    table = table[np.lexsort((table[:, 1], place[table[:, 0]]))].astype(np.int32)
    streams = Streams(table[:, 0], table[:, 2], table[:, 4 : 4 + RANK], table[:, 4 + RANK :], table[:, 3])
    return tuple(maps), streams
