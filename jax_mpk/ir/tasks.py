"""The task graph: what one worker runs without interruption (tasks), and the counters that order them (events).

Everything is a structure of NumPy arrays: a 36-layer model has 30,000 tasks and a pass must not loop over them in
Python. The terms are those of Mirage Persistent Kernel (arXiv 2512.22219): a *task* runs on one worker; an *event* is
a counter that tasks trigger and tasks wait for. Every task of one operator belongs to one *grid*.

Program order: tasks are numbered so that the sequential execution 0, 1, 2, ... is the meaning of the program (it
follows the operators of the op graph). Any parallel execution must be equivalent to it; `jax_mpk.verify` proves that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

BOX_RANK = 4
"""Strided dimensions of a box, besides its contiguous run."""


@dataclass(frozen=True)
class Buffer:
    """A block of memory. `space`: "arg", "result", "workspace" or "const"; `index` is the operand or result number.

    `offset` is the byte offset inside the workspace or the constant section (-1 before the memory plan). A result
    that lives in a donated operand has `alias` = that operand's number, and the operand has no buffer of its own
    after that (both names are one buffer). `defined` says that it holds data before the first task.
    """

    id: int
    space: str
    index: int
    nbytes: int
    dtype: str
    name: str
    offset: int = -1
    alias: int = -1
    data: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def defined(self) -> bool:
        return self.space in ("arg", "const") or self.alias >= 0


@dataclass(frozen=True)
class Boxes:
    """The bytes that tasks read and write, one row a box, sorted by task.

    Row r is `{ offset + sum_d j_d * stride[d] + [0, run) : 0 <= j_d < count[d] }` of buffer `buffer`, relative to the
    buffer's start. Unused dimensions have count 1 and stride 0. Within a row the pieces do not overlap each other.
    `mode`: READ, WRITE, or UPDATE (written in part, at a place known at run time, the rest keeps its value; the task
    also reads it). A write box is exact; a read box or update box may cover more than is touched.
    """

    task: np.ndarray  # i32 [n]
    buffer: np.ndarray  # i32 [n]
    mode: np.ndarray  # u8 [n]
    offset: np.ndarray  # i64 [n], bytes
    run: np.ndarray  # i64 [n], bytes
    count: np.ndarray  # i64 [n, BOX_RANK]
    stride: np.ndarray  # i64 [n, BOX_RANK], bytes

    def __len__(self) -> int:
        return len(self.task)


READ, WRITE, UPDATE = 0, 1, 2


@dataclass(frozen=True)
class Csr:
    """A ragged list of lists of integers: row i is `data[start[i]:start[i+1]]`."""

    start: np.ndarray  # i64 [rows + 1]
    data: np.ndarray  # i32

    def row(self, i: int) -> np.ndarray:
        return self.data[self.start[i] : self.start[i + 1]]

    @property
    def rows(self) -> int:
        return len(self.start) - 1

    def row_of(self) -> np.ndarray:
        """The row number of every entry of `data`."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), np.diff(self.start))

    @staticmethod
    def from_pairs(row: np.ndarray, col: np.ndarray, rows: int) -> Csr:
        """Rows sorted, columns sorted within a row, duplicates removed."""
        cols = int(col.max()) + 1 if len(col) else 1
        key = np.sort(row.astype(np.int64) * cols + col)  # several times faster than np.unique
        key = key[np.flatnonzero(np.diff(key, prepend=-1))]
        r = key // cols
        start = np.zeros(rows + 1, np.int64)
        np.cumsum(np.bincount(r, minlength=rows), out=start[1:])
        return Csr(start, (key % cols).astype(np.int32))

    @staticmethod
    def empty(rows: int) -> Csr:
        return Csr(np.zeros(rows + 1, np.int64), np.zeros(0, np.int32))


@dataclass(frozen=True)
class Grid:
    """The tasks of one operator: `first .. first+count-1` in program order, index 0 first.

    `extent` and `tile` are per loop axis of the operator (the order that `jax_mpk.abi` fixes per kind); the task with
    grid index g covers, along each axis, tile number = the mixed-radix digit of g (first axis slowest).
    `op` is the position of the operator in the graph, -1 for tasks that normalisation inserted.
    """

    op: int
    kind: str
    name: str
    extent: tuple[int, ...]
    tile: tuple[int, ...]
    first: int
    count: int
    source: str = ""


@dataclass(frozen=True)
class Streams:
    """The weight streams: per worker, the stream-operand frames in consumption order (DESIGN.md 4).

    Entry e belongs to task `task[e]` and stands for `frames[e]` consecutive frames; frame f is the box at coordinates
    `start[e] + f * step[e]` (innermost first) of tensor map `map[e]`. Entries are sorted by the task's linear order.
    """

    task: np.ndarray  # i32 [n]
    map: np.ndarray  # i32 [n]
    start: np.ndarray  # i32 [n, 4]
    step: np.ndarray  # i32 [n, 4]
    frames: np.ndarray  # i32 [n]


@dataclass(frozen=True)
class TensorMap:
    """A stream operand as the tensor copy engine sees it: dims and byte strides innermost first, and the frame box."""

    buffer: int
    offset: int
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class TaskGraph:
    """The task graph of one program; passes fill it in from top to bottom.

    After `dependencies`: `deps` (row = task, data = the tasks that must finish before it; transitively reduced).
    After `events`: `waits` (row = task, data = events), `triggers` (row = task, data = events), `threshold` per event.
    A task starts when every event in its row of `waits` has been triggered `threshold` times, and triggers its events
    once each when its writes are done. After `linearise`: `order` (a permutation: position -> task). After
    `placement`: `worker` per task; a worker runs its tasks in the order of `order`. `shares` (GPUs): the workers of every
    task, one a part. After `bodies`: `units` per grid, and `shared` (GPUs), as `jax_mpk.passes.bodies` has them.
    """

    grids: tuple[Grid, ...]
    buffers: tuple[Buffer, ...]
    grid_of: np.ndarray  # i32 [tasks]
    index: np.ndarray  # i32 [tasks], grid index
    boxes: Boxes
    deps: Csr | None = None
    waits: Csr | None = None
    triggers: Csr | None = None
    threshold: np.ndarray | None = None  # i32 [events]
    order: np.ndarray | None = None  # i32 [tasks]
    workers: int = 0
    worker: np.ndarray | None = None  # i32 [tasks]
    maps: tuple[TensorMap, ...] = ()
    streams: Streams | None = None
    shares: Csr | None = None
    units: tuple[Any, ...] = ()
    shared: Any = None
    workspace: int = 0

    @property
    def tasks(self) -> int:
        return len(self.grid_of)

    @property
    def events(self) -> int:
        return 0 if self.threshold is None else len(self.threshold)

    def unit(self, grid: int) -> Any:
        """What the tasks of a grid do; None for those that normalisation inserted."""
        return self.units[grid] if grid < len(self.units) else None

    def task_name(self, t: int) -> str:
        """`task 17 (gate_up[3] on worker 5)`: how every message names a task."""
        g = self.grids[self.grid_of[t]]
        where = f" on worker {self.worker[t]}" if self.worker is not None else ""
        return f"task {t} ({g.name}[{self.index[t]}]{where})"

    def __str__(self) -> str:
        lines = [f"task graph: {self.tasks} tasks in {len(self.grids)} grids, {self.events} events, "
                 f"{len(self.buffers)} buffers, {self.workers} workers, workspace {self.workspace} bytes"]  # fmt: skip
        for b in self.buffers:
            at = f" at {b.offset}" if b.offset >= 0 else ""
            alias = f" in operand {b.alias}" if b.alias >= 0 else ""
            lines.append(f"  buffer {b.id} {b.name}: {b.space} {b.index}, {b.nbytes} bytes{at}{alias}")
        for n, g in enumerate(self.grids):
            axes = " x ".join(f"{e}/{t}" if t < e else str(e) for e, t in zip(g.extent, g.tile, strict=True))
            lines.append(
                f"  grid {n} {g.name}: {g.kind} [{axes}], tasks {g.first}..{g.first + g.count - 1}  # {g.source}"
            )
        if self.waits is not None and self.triggers is not None and self.threshold is not None:
            rows = self.triggers.row_of()
            for e in range(self.events):
                p = rows[self.triggers.data == e]
                c = self.waits.row_of()[self.waits.data == e]
                lines.append(f"  event {e}: {self.threshold[e]} triggers from {_span(p)}, waited for by {_span(c)}")
        return "\n".join(lines)


def _span(t: np.ndarray) -> str:
    if not len(t):
        return "nobody"
    return f"task {t[0]}" if len(t) == 1 else f"{len(t)} tasks {t.min()}..{t.max()}"
