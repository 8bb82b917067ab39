"""Placement: which worker runs a task, and the weight streams.

Every operator is dealt to the workers in contiguous runs of tasks with equal bytes; who got more than the others last
time gets less the next time, so remainders rotate. The assignment is a proposal: any other one is correct too.

On a target that streams weights, the operators of one level (Q, K and V) are dealt as one, because the next level waits for
all of them, and what a worker got too much of before decides only between workers that are level now. Tasks of a level with
equal prologues go to one worker where that costs no balance: it computes the prologue once (`prologue` in `jax_mpk.abi`).

A *stream operand* is a weight that the program only reads, through a plain strided access. Its tiles are cut into
frames, listed in the order of consumption, so that a loader can run ahead of every event.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np

from jax_mpk.ir import loops
from jax_mpk.ir.expr import Load
from jax_mpk.ir.graph import Contract, Graph, itemsize
from jax_mpk.ir.tasks import READ, WRITE, Grid, Streams, TaskGraph, TensorMap
from jax_mpk.passes.boxes import bytes_of, ragged
from jax_mpk.passes.decompose import buffer_of
from jax_mpk.passes.hops import levels
from jax_mpk.targets import Target

WINDOW = 8
"""Operators over which uneven work is remembered."""
RANK = 4
"""Dimensions of a tensor map."""


def run(tg: TaskGraph, graph: Graph, target: Target, workers: int | None = None) -> TaskGraph:
    """`tg` with `workers`, `worker`, `maps` and `streams`."""
    workers = target.workers if workers is None else workers
    maps, streams = _streams(tg, graph, target)
    same = None if streams is None else _prologues(tg, graph)
    worker = _workers(tg, _cost(tg, streams, target), same, workers)
    return replace(tg, workers=workers, worker=worker, maps=maps, streams=streams)


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


def _prologues(tg: TaskGraph, graph: Graph) -> np.ndarray:
    """A number per task, -1 if it has no prologue: equal numbers, equal activations (expression, slice and rows)."""
    out = np.full(tg.tasks, -1, np.int64)
    number: dict[tuple, int] = {}
    used = 0
    for grid in tg.grids:
        op = graph.ops[grid.op] if grid.op >= 0 else None
        if not isinstance(op, Contract):
            continue
        rows = [(x, t) for x, t in zip(loops.loop_axes(op), grid.tile, strict=True) if x.role != "n"]
        key = (op.lhs, tuple(rows))
        parts = [math.ceil(e / t) for e, t in zip(grid.extent, grid.tile, strict=True)]
        flat, size = np.zeros(grid.count, np.int64), 1
        for x, n, digit in zip(loops.loop_axes(op), parts, np.unravel_index(np.arange(grid.count), parts), strict=True):
            if x.role != "n":
                flat, size = flat * n + digit, size * n
        first = number.setdefault(key, used)
        used = max(used, first + size)
        out[grid.first : grid.first + grid.count] = first + flat
    return out


def _cost(tg: TaskGraph, streams: Streams | None, target: Target) -> np.ndarray:
    """Bytes that a task moves: what cores read, and writes. The read box of a gather says nothing about its size.

    On a target that streams, the stream of weights is what has to be even: its frames count, and not the activations,
    which come from a cache. An attention is split over all workers when the program is planned for a device.
    """
    core = np.array([g.kind in ("contract", "attention", "sort") for g in tg.grids], bool)
    if streams is not None:
        core &= np.array([g.kind != "attention" for g in tg.grids], bool)
    count = (tg.boxes.mode == WRITE) | ((tg.boxes.mode == READ) & core[tg.grid_of[tg.boxes.task]])
    cost = np.maximum(np.bincount(tg.boxes.task, np.where(count, bytes_of(tg.boxes), 0), tg.tasks), 1.0)
    if streams is None:
        return cost
    frames = np.bincount(streams.task, streams.frames, tg.tasks)
    return np.where(frames > 0, frames * target.frame, cost)


def _quota(load: np.ndarray, total: float) -> np.ndarray:
    """How much of `total` each worker takes so that all end level: the water that fills the vessel `load`."""
    low = np.sort(load)
    need = low * np.arange(1, len(low) + 1) - np.cumsum(low)  # to raise the n lowest to the n-th
    n = int(np.searchsorted(need, total, "right"))
    return np.maximum((total + low[:n].sum()) / n - load, 0)


# ------------------------------------------------------------------------------------------------------------- streams


def _streams(tg: TaskGraph, graph: Graph, target: Target) -> tuple[tuple[TensorMap, ...], Streams | None]:
    if not target.ring:
        return (), None
    assert tg.order is not None
    buffer = buffer_of(graph)
    written = set(tg.boxes.buffer[tg.boxes.mode != READ].tolist())
    maps: dict[TensorMap, int] = {}
    tables = [np.zeros((0, 4 + 2 * RANK), np.int64)]  # task, place inside the task, map, frames, start, step
    for grid in tg.grids:
        op = graph.ops[grid.op] if grid.op >= 0 else None
        for j, rhs in enumerate(op.rhs if isinstance(op, Contract) else ()):
            if isinstance(rhs, Load) and graph.values[rhs.value].role != "temp" and buffer[rhs.value] not in written:
                plan = _plan(graph, op, rhs, buffer[rhs.value], target)
                if plan is not None:
                    table = _entries(grid, op, plan)
                    table[:, 1] = table[:, 1] * len(op.rhs) + j
                    table[:, 2] = maps.setdefault(plan[0], len(maps))
                    tables.append(table)
    table = np.concatenate(tables)
    place = np.empty(tg.tasks, np.int64)
    place[tg.order] = np.arange(tg.tasks)
    table = table[np.lexsort((table[:, 1], place[table[:, 0]]))].astype(np.int32)
    streams = Streams(table[:, 0], table[:, 2], table[:, 4 : 4 + RANK], table[:, 4 + RANK :], table[:, 3])
    return tuple(maps), streams


def _plan(graph: Graph, op: Contract, rhs: Load, buffer: int, target: Target) -> tuple[TensorMap, tuple] | None:
    """The tensor map of a stream operand, and (columns a frame, dim of the columns, dim of k, k a step, batch dims)."""
    value = graph.values[rhs.value]
    access = loops.flatten(value, rhs.coords)
    size = itemsize(value.dtype)
    inner, rows = target.inner // size, target.frame // target.inner
    axes = [x for x in loops.loop_axes(op) if x.extent > 1]
    n, k, batch = ([x for x in axes if x.role == r] for r in ("n", "k", "batch"))
    extent_n, extent_k = math.prod(x.extent for x in n), math.prod(x.extent for x in k)
    step_n, step_k = access.stride(n[-1].axis) if n else 0, access.stride(k[-1].axis) if k else 0
    if access.dyn or 1 not in (step_n, step_k) or not step_n or not step_k:
        return None
    if step_n == 1:
        dims, strides, box = [extent_n, extent_k], [1, step_k], [inner, rows]
        shape = (inner, 0, 1, rows)
    else:
        if extent_k % inner:
            return None  # the last run of a row would reach into the next row
        dims, strides, box = [inner, extent_n, extent_k // inner], [1, step_n, inner], [inner, target.columns]
        box.append(max(1, rows // target.columns))
        shape = (target.columns, 1, 2, box[2])
    where = tuple(range(len(dims), len(dims) + len(batch)))
    dims += [x.extent for x in batch]
    strides += [access.stride(x.axis) for x in batch]
    if len(dims) > RANK or any(s <= 0 or s * size % 16 for s in strides[1:]) or access.offset * size % 16:
        return None
    box += [1] * len(batch)
    if any(b > d for b, d in zip(box, dims, strict=True)):
        return None  # smaller than a frame: not worth a stream
    fit = TensorMap(
        buffer, access.offset * size, value.dtype, tuple(dims), tuple(s * size for s in strides), tuple(box)
    )
    return fit, (*shape, where)


def _entries(grid: Grid, op: Contract, plan: tuple[TensorMap, tuple]) -> np.ndarray:
    """One row per task, batch point of its tile, and group of columns of its tile."""
    fit, (columns, dim_n, dim_k, step, batch_dims) = plan
    axes = loops.loop_axes(op)
    parts = [math.ceil(e / t) for e, t in zip(grid.extent, grid.tile, strict=True)]
    digit = np.unravel_index(np.arange(grid.count), parts)
    row = np.arange(grid.count)
    start = np.zeros((grid.count, RANK), np.int64)
    at = iter(batch_dims)
    for n, x in enumerate(axes):
        if x.role == "batch" and x.extent > 1:
            lo = digit[n][row] * grid.tile[n]
            i, value = ragged(lo, np.minimum(lo + grid.tile[n], x.extent))
            row, start = row[i], start[i]
            start[:, next(at)] = value
    n_axes = [n for n, x in enumerate(axes) if x.role == "n"]
    inner = math.prod(axes[n].extent for n in n_axes[1:])
    lo = digit[n_axes[0]] * grid.tile[n_axes[0]]
    hi = np.minimum(lo + grid.tile[n_axes[0]], grid.extent[n_axes[0]])
    i, group = ragged(np.zeros_like(row), -(-(hi - lo)[row] * inner // columns))
    row, start = row[i], start[i]
    start[:, dim_n] = lo[row] * inner + group * columns
    out = np.zeros((len(row), 4 + 2 * RANK), np.int64)
    out[:, 0], out[:, 1] = grid.first + row, np.arange(len(row))
    out[:, 3], out[:, 4 : 4 + RANK] = math.ceil(fit.dims[dim_k] / step), start
    out[:, 4 + RANK + dim_k] = step
    return out
