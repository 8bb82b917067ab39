"""The task graph of a blob: what an executor will run, decoded without the compiler that wrote it."""

from __future__ import annotations

import math

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import WRITE, Boxes, Buffer, Csr, Grid, Streams, TaskGraph, TensorMap
from jax_mpk.verify import frames, gpu
from jax_mpk.verify.codes import Operator, Touch, accessed, expand, touches


def task_graph(program: abi.Program) -> TaskGraph:
    """Grids, boxes, events, order, workers and streams as the program has them. Tasks are numbered in program order
    (operator by operator, grid index by grid index); the records' own order is `order`."""
    on_gpu = gpu.is_gpu(program)
    if on_gpu:
        gpu.check_units(program)
    buffers = _buffers(program)
    grids, rows = [], [np.zeros((0, 13), np.int64)]
    known: dict[bytes, np.ndarray] = {}
    prologues: dict[int, list[Touch]] = {}
    first = 0
    for n, op in enumerate(program["Op"]):
        name, axes = program.name(int(op["name"])), int(op["n_axes"])
        extent, tile = op["extent"][:axes].tolist(), op["tile"][:axes].tolist()
        if min(extent, default=1) < 1 or min(tile, default=1) < 1:
            raise VerifyError(f"operator {name} has extents {extent} and tiles {tile}")
        count = int(np.prod([-(-e // t) for e, t in zip(extent, tile, strict=True)], dtype=np.int64))
        key = abi.structure(op)
        if key not in known:
            known[key] = expand(extent, tile, touches(program, op, name))
        rows.append(_bound(program, op, name, known[key], first))
        if on_gpu:
            rows.append(_left(program, n, first, count))
            if program["Unit"][n]["parts"] > 1:
                gpu.check_appends(program, Operator(program, op, name))
            if op["prologue"]:
                prologues[n] = list(accessed(Operator(program, op, name), "LHS"))
        kind = abi.ENUMS["Kind"][int(op["kind"])].lower()
        grids.append(Grid(-1 if kind == "nop" else n, kind, name, tuple(extent), tuple(tile), first, count))
        first += count
    sizes = np.array([g.count for g in grids], np.int64)
    grid_of = np.repeat(np.arange(len(grids), dtype=np.int32), sizes)
    index = (np.arange(first) - np.repeat(np.cumsum(sizes) - sizes, sizes)).astype(np.int32)
    table = np.concatenate(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    boxes = Boxes(table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), table[:, 2].astype(np.uint8), table[:, 3],
                  table[:, 4], table[:, 5:9], table[:, 9:])  # fmt: skip
    workspace = int(program["Kernel"][0]["spill_at"]) if on_gpu else int(program.header["workspace"])
    out = _records(program, TaskGraph(tuple(grids), buffers, grid_of, index, boxes, workspace=workspace))
    if on_gpu:
        gpu.check_prologues(program, out, prologues)
    return out


def _left(p: abi.Program, n: int, first: int, count: int) -> np.ndarray:
    """The boxes of what the parts of an operator's tasks leave for the last one: a slice a task."""
    op = p["Op"][n]
    if p["Unit"][n]["parts"] == 1:
        return np.zeros((0, 13), np.int64)
    x = Operator(p, op, p.name(int(op["name"])))
    batch, rows = x.param("N_BATCH"), x.param("N_ROWS")
    buffer, nbytes = gpu.share(p, n, math.prod(x.tile[batch : batch + rows]), x.extent[batch + rows])
    out = np.zeros((count, 13), np.int64)
    out[:, 0], out[:, 1], out[:, 2] = first + np.arange(count), buffer, WRITE
    out[:, 3], out[:, 4], out[:, 5:9] = np.arange(count) * nbytes, nbytes, 1
    return out


def _buffers(p: abi.Program) -> tuple[Buffer, ...]:
    out = []
    for n, b in enumerate(p["Buffer"]):
        space = abi.ENUMS["Space"][int(b["space"])].lower()
        placed = space in ("workspace", "const")
        out.append(Buffer(n, space, int(b["index"]), int(b["bytes"]), abi.ENUMS["Dtype"][int(b["dtype"])].lower(),
                          p.name(int(b["name"])), int(b["offset"]) if placed else -1, int(b["alias"])))  # fmt: skip
    return tuple(out)


def _bound(p: abi.Program, op: np.void, name: str, rows: np.ndarray, first: int) -> np.ndarray:
    """The boxes of an operator with its slots bound and its tasks numbered."""
    slots = p["Slot"][int(op["slot"]) : int(op["slot"] + op["slots"])]
    if len(rows) and rows[:, 1].max() >= len(slots):
        raise VerifyError(f"operator {name} uses slot {rows[:, 1].max()} of {len(slots)}")
    out = rows.copy()
    if len(rows):
        out[:, 3] += slots["offset"][rows[:, 1]]
        out[:, 1] = slots["buffer"][rows[:, 1]]
        out[:, 0] += first
    return out


def _records(p: abi.Program, tg: TaskGraph) -> TaskGraph:
    """Order, workers, events and streams from the task records."""
    t = p["Task"]
    first = np.array([g.first for g in tg.grids], np.int64)
    count = np.array([g.count for g in tg.grids], np.int64)
    if len(t) and (t["op"].max() >= len(first) or (t["index"] >= count[t["op"]]).any()):
        raise VerifyError("a task record names a task that its operator does not have")
    number = (first[t["op"]] + t["index"]).astype(np.int64) if len(t) else np.zeros(0, np.int64)
    every, order = number, number
    if gpu.is_gpu(p):
        keep = gpu.parts(p, number)
        t, number = t[keep], number[keep]
    missing = np.setdiff1d(np.arange(tg.tasks), number)
    if len(missing) or len(t) != tg.tasks:
        which = tg.task_name(int(missing[0])) + " has no record" if len(missing) else "a task has two records"
        raise VerifyError(f"{len(t)} task records for {tg.tasks} tasks: {which}")

    def rows(count: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        used = np.arange(t[column].shape[1]) < t[count][:, None]
        row, at = np.nonzero(used)
        return number[row], t[column][row, at].astype(np.int64)

    threshold = p["Event"]["threshold"].astype(np.int32)
    task, event = rows("n_waits", "wait")
    _, want = rows("n_waits", "want")
    for e in np.flatnonzero(event >= len(threshold))[:1]:
        raise VerifyError(f"{tg.task_name(int(task[e]))} waits for event {event[e]} of {len(threshold)}")
    for e in np.flatnonzero(want != threshold[event])[:1]:
        raise VerifyError(f"{tg.task_name(int(task[e]))} waits for {want[e]} triggers of event {event[e]}, whose threshold "
                          f"is {threshold[event[e]]}")  # fmt: skip
    source, fired = rows("n_triggers", "trigger")
    for e in np.flatnonzero(fired >= len(threshold))[:1]:
        raise VerifyError(f"{tg.task_name(int(source[e]))} triggers event {fired[e]} of {len(threshold)}")
    worker = np.empty(tg.tasks, np.int32)
    worker[number] = t["worker"]
    maps, streams = _streams(p, every)
    if gpu.is_gpu(p):
        order = gpu.order(p, every, tg.tasks)
        frames.check(p, every, first)
        if streams is not None:
            rank = np.empty(tg.tasks, np.int64)
            rank[order] = np.arange(tg.tasks)
            by = np.argsort(rank[streams.task], kind="stable")
            streams = Streams(*(getattr(streams, f)[by] for f in ("task", "map", "start", "step", "frames")))
    return TaskGraph(tg.grids, tg.buffers, tg.grid_of, tg.index, tg.boxes, None, _csr(task, event, tg.tasks),
                     _csr(source, fired, tg.tasks), threshold, order.astype(np.int32), int(p.header["workers"]), worker,
                     maps, streams, workspace=tg.workspace)  # fmt: skip


def _csr(row: np.ndarray, data: np.ndarray, rows: int) -> Csr:
    """Rows with repetitions kept: a task that triggers an event twice counts twice."""
    by = np.lexsort((data, row))
    start = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=start[1:])
    return Csr(start, data[by].astype(np.int32))


def _streams(p: abi.Program, number: np.ndarray) -> tuple[tuple[TensorMap, ...], Streams | None]:
    maps = []
    for m in p["TensorMap"]:
        n = int(m["rank"])
        dims, strides, box = (tuple(m[f][:n].tolist()) for f in ("dims", "strides", "box"))
        maps.append(TensorMap(int(m["buffer"]), int(m["offset"]), abi.ENUMS["Dtype"][int(m["dtype"])].lower(), dims, strides,
                              box))  # fmt: skip
    s = p["Stream"]
    if not len(s):
        return tuple(maps), None
    if s["task"].max() >= len(number):
        raise VerifyError(f"a stream entry names task record {s['task'].max()} of {len(number)}")
    return tuple(maps), Streams(number[s["task"]].astype(np.int32), s["map"].astype(np.int32), s["start"], s["step"],
                                s["frames"].astype(np.int32))  # fmt: skip
