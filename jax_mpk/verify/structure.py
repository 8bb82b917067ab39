"""Is the task graph well formed? Lengths, ranges, grids, boxes inside buffers, buffers inside the workspace."""

from __future__ import annotations

import math

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import BOX_RANK, READ, UPDATE, Csr, TaskGraph
from jax_mpk.verify.boxes import Shapes, canonical, self_overlaps


def check(tg: TaskGraph) -> Shapes:
    """Everything that the other checks rely on; returns the boxes in canonical form."""
    for field in ("waits", "triggers", "threshold", "order", "worker"):
        if getattr(tg, field) is None:
            raise VerifyError(f"incomplete task graph: no {field}")
    _grids(tg)
    _tasks(tg)
    _buffers(tg)
    return _boxes(tg)


def _grids(tg: TaskGraph) -> None:
    first = 0
    for n, g in enumerate(tg.grids):
        if g.first != first or g.count < 0:
            raise VerifyError(f"grid {n} {g.name} starts at task {g.first}, the one before it ends at {first}")
        if len(g.extent) != len(g.tile) or any(t < 1 for t in g.tile) or any(e < 0 for e in g.extent):
            raise VerifyError(f"grid {n} {g.name}: extents {g.extent} and tiles {g.tile} do not fit each other")
        tiles = math.prod(-(-e // t) for e, t in zip(g.extent, g.tile, strict=True))
        if g.op >= 0 and tiles != g.count:
            raise VerifyError(f"grid {n} {g.name}: {tiles} tiles, but {g.count} tasks")
        first += g.count
    if first != tg.tasks or len(tg.index) != tg.tasks:
        raise VerifyError(f"the grids have {first} tasks, grid_of {tg.tasks} and index {len(tg.index)}")
    counts = np.array([g.count for g in tg.grids], np.int64)
    grid = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(tg.tasks) - np.repeat(np.cumsum(counts) - counts, counts)
    for t in np.flatnonzero((tg.grid_of != grid) | (tg.index != index))[:1]:
        raise VerifyError(f"task {t} is number {tg.index[t]} of grid {tg.grid_of[t]}, not {index[t]} of grid {grid[t]}")


def _tasks(tg: TaskGraph) -> None:
    assert tg.waits is not None and tg.triggers is not None and tg.order is not None and tg.worker is not None
    _csr(tg, "waits", tg.waits, abi.MAX_WAITS)
    _csr(tg, "triggers", tg.triggers, abi.MAX_TRIGGERS)
    if len(tg.order) != tg.tasks or (np.sort(tg.order) != np.arange(tg.tasks)).any():
        raise VerifyError("the linear order is not a permutation of the tasks")
    if len(tg.worker) != tg.tasks:
        raise VerifyError(f"{tg.tasks} tasks, but {len(tg.worker)} of them have a worker")
    for t in np.flatnonzero((tg.worker < 0) | (tg.worker >= tg.workers))[:1]:
        raise VerifyError(f"{tg.task_name(t)}: there are {tg.workers} workers")


def _csr(tg: TaskGraph, name: str, csr: Csr, limit: int) -> None:
    n = np.diff(csr.start)
    if csr.rows != tg.tasks or csr.start[0] != 0 or (n < 0).any() or csr.start[-1] != len(csr.data):
        raise VerifyError(f"{name}: not one row for each of {tg.tasks} tasks")
    for t in np.flatnonzero(n > limit)[:1]:
        raise VerifyError(f"{tg.task_name(t)}: {n[t]} {name}, at most {limit} fit its record")
    row = csr.row_of()
    for e in np.flatnonzero((csr.data < 0) | (csr.data >= tg.events))[:1]:
        raise VerifyError(f"{tg.task_name(row[e])}: {name} name event {csr.data[e]} of {tg.events}")
    key = np.sort(row.astype(np.int64) * tg.events + csr.data)
    for k in key[1:][key[1:] == key[:-1]][:1]:
        raise VerifyError(f"{tg.task_name(k // tg.events)}: {name} name event {k % tg.events} twice")


def _buffers(tg: TaskGraph) -> None:
    operands: dict[int, int] = {}
    results: dict[int, int] = {}
    for n, b in enumerate(tg.buffers):
        at = f"buffer {n} {b.name!r}"
        if b.id != n or b.nbytes < 0 or b.space not in ("arg", "result", "workspace", "const"):
            raise VerifyError(f"{at}: id {b.id}, {b.nbytes} bytes in {b.space!r}")
        if b.space == "workspace" and not 0 <= b.offset <= b.offset + b.nbytes <= tg.workspace:
            raise VerifyError(f"{at}: bytes [{b.offset}, {b.offset + b.nbytes}) of a workspace of {tg.workspace} bytes")
        if b.space == "const" and (b.offset < 0 or (b.data is not None and b.data.nbytes != b.nbytes)):
            raise VerifyError(f"{at}: {b.nbytes} bytes at {b.offset}, its data do not fit")
        if b.alias >= 0 and b.space != "result":
            raise VerifyError(f"{at}: only a result can live in an operand, this is in {b.space!r}")
        operand = b.index if b.space == "arg" else b.alias
        if operand >= 0 and b.space in ("arg", "result") and operands.setdefault(operand, n) != n:
            raise VerifyError(f"{at} and buffer {operands[operand]} are both operand {operand}")
        if b.space == "result" and results.setdefault(b.index, n) != n:
            raise VerifyError(f"{at} and buffer {results[b.index]} are both result {b.index}")


def _boxes(tg: TaskGraph) -> Shapes:
    x = tg.boxes
    shapes = {len(a) for a in (x.buffer, x.mode, x.offset, x.run, x.count, x.stride)}
    if shapes != {len(x)} or x.count.shape[1:] != (BOX_RANK,) or x.stride.shape[1:] != (BOX_RANK,):
        raise VerifyError("the columns of the boxes differ in length")
    if len(x) and (x.task[0] < 0 or x.task[-1] >= tg.tasks or (np.diff(x.task) < 0).any()):
        raise VerifyError("the boxes are not sorted by task")
    for r in np.flatnonzero((x.buffer < 0) | (x.buffer >= len(tg.buffers)) | (x.mode > UPDATE))[:1]:
        raise VerifyError(f"{tg.task_name(x.task[r])}: box {r} names buffer {x.buffer[r]} and mode {x.mode[r]}")
    for r in np.flatnonzero((x.run < 1) | (x.count < 1).any(1))[:1]:
        raise VerifyError(f"{tg.task_name(x.task[r])}: box {r} is empty (run {x.run[r]}, count {x.count[r]})")
    shape = canonical(x)
    nbytes = np.array([b.nbytes for b in tg.buffers], np.int64)
    lo, hi = shape.offset, shape.end
    for r in np.flatnonzero((lo < 0) | (hi > nbytes[x.buffer]))[:1]:
        b = tg.buffers[x.buffer[r]]
        raise VerifyError(f"{tg.task_name(x.task[r])}: box [{lo[r]}, {hi[r]}) of buffer {b.id} {b.name!r}, "
                          f"which has {b.nbytes} bytes")  # fmt: skip
    fixed = np.array([b.space in ("arg", "const") for b in tg.buffers], bool)
    for r in np.flatnonzero((x.mode != READ) & fixed[x.buffer])[:1]:
        b = tg.buffers[x.buffer[r]]
        raise VerifyError(f"{tg.task_name(x.task[r])} writes buffer {b.id} {b.name!r}, which is an {b.space}")
    for r in self_overlaps(shape)[:1]:
        b = tg.buffers[x.buffer[r]]
        raise VerifyError(f"{tg.task_name(x.task[r])}: the pieces of box [{lo[r]}, {hi[r]}) of buffer {b.id} {b.name!r} "
                          "overlap each other")  # fmt: skip
    return shape
