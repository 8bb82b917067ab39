"""The messages: which two tasks, which bytes of which buffer. Only built when something is wrong, so in plain Python."""

from __future__ import annotations

import numpy as np

from jax_mpk.ir.tasks import READ, WRITE, TaskGraph
from jax_mpk.verify.accesses import Accesses
from jax_mpk.verify.boxes import Shapes, join, rectangles, starts

_VERB = ("reads", "writes", "updates")


class Report:
    """Names things of one task graph. Cells and groups are those of `Accesses`."""

    def __init__(self, tg: TaskGraph, shape: Shapes):
        self.tg, self.shape = tg, shape

    def _buffer(self, b: int) -> str:
        x = self.tg.buffers[b]
        return f"buffer {b} {x.name!r}" + (f" ({x.space} {x.index})" if x.space in ("result", "arg") else "")

    def _bytes(self, b: int, lo: int, hi: int) -> str:
        return f"bytes [{lo}, {hi}) of {self._buffer(b)}"

    def _common(self, acc: Accesses, i: int, j: int) -> str:
        """The first bytes that two cells share, in terms of the buffer of the first one."""
        shape, base = acc.shape[np.array([i, j])], 0
        if acc.buffer[i] != acc.buffer[j]:
            base = acc.base[acc.buffer[i]]
            shape.offset[:] += acc.base[acc.buffer[[i, j]]]
        two = rectangles(shape)
        a, b = two.of(np.array([True, False])), two.of(np.array([False, True]))
        x, y = join(a, b)
        lo, hi = min(a.meet(x, b, y).first_run(n) for n in range(len(x)))
        text = self._bytes(acc.buffer[i], lo - base, hi - base)
        if acc.buffer[i] != acc.buffer[j]:
            text += f", where {self._buffer(acc.buffer[j])} is, too"
        return text

    def unordered(self, acc: Accesses, g: int, a: int, h: int, b: int) -> str:
        i, j = acc.cell[g], acc.cell[h]
        return (f"{self.tg.task_name(a)} {_VERB[acc.mode[i]]} {self._common(acc, i, j)}; "
                f"{self.tg.task_name(b)} {_VERB[acc.mode[j]]} them, but no chain of events puts it after the first")  # fmt: skip

    def both(self, acc: Accesses, g: int, h: int) -> str:
        i, j = acc.cell[g], acc.cell[h]
        return (f"{self.tg.task_name(acc.first[g])} {_VERB[acc.mode[i]]} {self._common(acc, i, j)}, "
                f"and {_VERB[acc.mode[j]]} that one at the same place{self._neighbour(acc, i, acc.first[g])}")  # fmt: skip

    def twice(self, acc: Accesses, g: int, h: int) -> str:
        i, j = acc.cell[g], acc.cell[h]
        a, b = sorted((int(acc.first[g]), int(acc.first[h])))
        return (f"{self.tg.task_name(a)} and {self.tg.task_name(b)} both write {self._common(acc, i, j)}, "
                "of which every byte is to be written once")  # fmt: skip

    def clobbered(self, acc: Accesses, cells: tuple[int, int, int], tasks: tuple[int, int, int],
                  run: tuple[int, int]) -> str:  # fmt: skip
        one, two, three = cells
        a, b, c = map(self.tg.task_name, tasks)
        base = acc.base[acc.buffer[one]]
        where = self._bytes(acc.buffer[one], run[0] - base, run[1] - base)
        return (f"{a} writes {where}, {b} overwrites them through {self._buffer(acc.buffer[two])}, "
                f"and {c} {_VERB[acc.mode[three]]} them after that")  # fmt: skip

    def never_written(self, row: int) -> str:
        x = self.tg.boxes
        b, t = int(x.buffer[row]), int(x.task[row])
        text = f"{self.tg.task_name(t)} reads {self._bytes(b, self.shape.offset[row], self.shape.end[row])}"
        others = x.task[(x.buffer == b) & (x.task != t)]
        also = f"; neither does {self.tg.task_name(others[0])}, which also reads it" if len(others) else ""
        return f"{text}, a buffer that no task writes{also}"

    def undefined(self, acc: Accesses, h: int) -> str:
        j = int(acc.cell[h])
        b, t = int(acc.buffer[j]), int(acc.first[h])
        x = self.tg.boxes
        writes = np.flatnonzero((x.buffer == b) & (x.mode == WRITE))
        lo, hi = _gap(*self._pieces(acc.row[[j]])[1:], *self._pieces(writes[x.task[writes] < t])[1:])
        text = f"{self.tg.task_name(t)} {_VERB[acc.mode[j]]} {self._bytes(b, lo, hi)}"
        row, p, q = self._pieces(writes[x.task[writes] >= t])
        late = row[(p < hi) & (lo < q)]
        if len(late):
            return f"{text}, which {self.tg.task_name(x.task[late[0]])} writes only after that in program order"
        return f"{text}, which no task writes{self._neighbour(acc, j, t)}"

    def not_covered(self, b: int) -> str:
        x = self.tg.boxes
        writes = np.flatnonzero((x.buffer == b) & (x.mode == WRITE))
        lo, hi = _gap(np.array([0]), np.array([self.tg.buffers[b].nbytes]), *self._pieces(writes)[1:])
        others = np.flatnonzero((x.buffer == b) & (x.mode != WRITE))
        near: dict[int, str] = {}  # per task, the first that applies
        for rows, what in (
            (writes[self.shape.offset[writes] < lo][-1:], "writes bytes before them"),
            (writes[self.shape.end[writes] > hi][:1], "writes bytes after them"),
            (others[:2], "reads the buffer"),
        ):
            for t in x.task[rows].tolist():
                near.setdefault(t, f"{self.tg.task_name(t)} {what}")
        text = f"{self._bytes(b, lo, hi)} are written by no task"
        return text + (f" ({', '.join([*near.values()][:2])})" if near else "")

    def _neighbour(self, acc: Accesses, cell: int, task: int) -> str:
        """Another task that writes the buffer: whoever looks for the mistake starts there."""
        x = self.tg.boxes
        rows = np.flatnonzero((x.buffer == acc.buffer[cell]) & (x.mode != READ) & (x.task != task))
        if not len(rows):
            return ""
        near = rows[np.argmin(np.abs(self.shape.offset[rows] - self.shape.offset[acc.row[cell]]))]
        return f" ({self.tg.task_name(x.task[near])} writes the nearest bytes of this buffer)"

    def _pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The contiguous pieces of these boxes: row, first byte, and one past the last byte."""
        at = [starts(self.shape, r) for r in rows.tolist()]
        row = np.repeat(rows, [len(a) for a in at])
        lo = np.concatenate([np.zeros(0, np.int64), *at])
        return row, lo, lo + self.shape.run[row]


def _gap(lo: np.ndarray, hi: np.ndarray, given_lo: np.ndarray, given_hi: np.ndarray) -> tuple[int, int]:
    """The first interval of the needed bytes [lo, hi) that is in none of the given intervals."""
    by = np.argsort(given_lo, kind="stable")
    given_lo, reach = given_lo[by], np.maximum.accumulate(given_hi[by])
    new = np.append(True, given_lo[1:] > reach[:-1])[: len(by)]  # intervals that touch are one
    start = given_lo[new]
    end = reach[np.append(np.flatnonzero(new)[1:] - 1, len(by) - 1)] if len(by) else reach
    place = np.searchsorted(start, lo, "right") - 1
    covered = np.append(end, -1)[place]  # place -1: nothing before it
    at = np.maximum(lo, covered)
    stop = np.minimum(hi, np.append(start, np.iinfo(np.int64).max)[place + 1])
    missing = np.flatnonzero(at < hi)
    n = missing[np.argmin(at[missing])]
    return int(at[n]), int(stop[n])
