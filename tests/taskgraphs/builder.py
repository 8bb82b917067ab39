"""Task graphs by hand, one box and one event at a time."""

from __future__ import annotations

import numpy as np

from jax_mpk.ir.tasks import BOX_RANK, Boxes, Buffer, Csr, Grid, TaskGraph

MAX = 4
"""Waits and triggers that fit a task record."""


class Builder:
    """Collects grids, boxes and events one by one."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.used: dict[str, int] = {}
        self.grids: list[Grid] = []
        self.boxes: list[tuple] = []
        self.waits: list[list[int]] = []
        self.triggers: list[list[int]] = []
        self.tasks = self.events = self.workspace = self.constants = 0

    def buffer(self, space: str, nbytes: int, name: str = "", alias: int = -1, offset: int = -1) -> int:
        index = self.used.get(space, 0)
        self.used[space] = index + 1
        if space == "workspace":
            offset = self.workspace if offset < 0 else offset
            self.workspace = max(self.workspace, offset + nbytes)
        if space == "const":
            offset, self.constants = self.constants, self.constants + nbytes
        b = len(self.buffers)
        self.buffers.append(Buffer(b, space, index, nbytes, "u8", name or f"{space}{index}", offset, alias))
        return b

    def grid(self, name: str, count: int, kind: str = "rows") -> range:
        self.grids.append(Grid(len(self.grids), kind, name, (count,), (1,), self.tasks, count))
        self.tasks += count
        self.waits += [[] for _ in range(count)]
        self.triggers += [[] for _ in range(count)]
        return range(self.tasks - count, self.tasks)

    def box(self, task: int, mode: int, buffer: int, offset: int, run: int, *dims: tuple[int, int]) -> None:
        """`dims`: (count, stride) pairs."""
        pad = [(1, 0)] * (BOX_RANK - len(dims))
        self.boxes.append(
            (task, buffer, mode, offset, run, *(c for c, _ in (*dims, *pad)), *(s for _, s in (*dims, *pad)))
        )

    def event(self, producers: list[int] | range, waiters: list[int] | range) -> int:
        for t in producers:
            self.triggers[t].append(self.events)
        for t in waiters:
            self.waits[t].append(self.events)
        self.events += 1
        return self.events - 1

    def build(self, workers: int = 1, order: np.ndarray | None = None, worker: np.ndarray | None = None) -> TaskGraph:
        table = np.array(sorted(self.boxes, key=lambda b: b[0]), np.int64).reshape(-1, 5 + 2 * BOX_RANK)
        boxes = Boxes(table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), table[:, 2].astype(np.uint8),
                      table[:, 3], table[:, 4], table[:, 5 : 5 + BOX_RANK], table[:, 5 + BOX_RANK :])  # fmt: skip
        counts = [g.count for g in self.grids]
        triggers = csr(self.triggers)
        return TaskGraph(
            grids=tuple(self.grids),
            buffers=tuple(self.buffers),
            grid_of=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            index=np.concatenate([np.arange(c, dtype=np.int32) for c in counts]),
            boxes=boxes,
            waits=csr(self.waits),
            triggers=triggers,
            threshold=np.bincount(triggers.data, minlength=self.events).astype(np.int32),
            order=np.arange(self.tasks, dtype=np.int32) if order is None else order,
            workers=workers,
            worker=np.arange(self.tasks, dtype=np.int32) % workers if worker is None else worker,
            workspace=self.workspace,
        )


def csr(rows: list[list[int]]) -> Csr:
    start = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(r) for r in rows], out=start[1:])
    return Csr(start, np.array([x for r in rows for x in r], np.int32))
