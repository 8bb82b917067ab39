"""`profile`: where the time of one launch went, from the times that its tasks left."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_mpk import abi
from jax_mpk.inspect import text, timeline

PARTS = ("prologue", "core", "epilogue", "waiting", "start", "end")
"""What a worker's time goes to: a task until its activation is in place, its sums over weights and keys, and what comes
after these; until the next task begins; before the first task and behind the last one."""


@dataclass(frozen=True)
class Operator:
    """What a profile knows of an operator: `where` is the user's line, `read` the bytes that its tasks read, each once."""

    name: str
    kind: str
    where: str
    read: int
    like: bytes
    """Operators of equal structure (the same one of every layer) have the same."""


@dataclass(frozen=True)
class Row:
    """Operators of one structure. span: from the first task of one to its last, summed. Of a task, in the mean: `wait`
    since its worker's task before; `hop` from the end of the last task that it needed until it began, where the worker
    waited for that; then the parts of the task. skew: between the first task to end and the last. All in us."""

    name: str
    where: str
    calls: int
    tasks: int
    read: int
    span: float
    wait: float
    hop: float
    prologue: float
    core: float
    epilogue: float
    skew: float


@dataclass(frozen=True)
class Profile:
    """One launch. Arrays have an entry for every task record of the program; times are us since the first task began.

    op, index, part, worker: which task of which operator, and who ran it. at [tasks, 4]: when it began, its activation was
    in place, its sums were, and it had ended (a kind without such a stage has the time before). wait, hop: see `Row`.
    """

    name: str
    platform: str
    workers: int
    operators: tuple[Operator, ...]
    op: np.ndarray
    index: np.ndarray
    part: np.ndarray
    worker: np.ndarray
    at: np.ndarray
    wait: np.ndarray
    hop: np.ndarray

    @property
    def total(self) -> float:
        """us from the first task to the last."""
        return float(self.at.max(initial=0.0))

    def rows(self) -> list[Row]:
        """The operators by structure, in the order in which they began."""
        groups: dict[bytes, list[int]] = collections.defaultdict(list)
        begin = np.full(len(self.operators), np.inf)
        np.minimum.at(begin, self.op, self.at[:, 0])
        for n in np.argsort(begin, kind="stable").tolist():
            if np.isfinite(begin[n]):
                groups[self.operators[n].like].append(n)
        return [self._row(ops) for ops in groups.values()]

    def _row(self, ops: list[int]) -> Row:
        first, mine = self.operators[ops[0]], np.isin(self.op, ops)
        each = [self.at[self.op == n] for n in ops]
        waited = self.hop[mine & (self.hop > 0)]
        prologue, core, epilogue = np.diff(self.at[mine], axis=1).mean(0).tolist()
        return Row(first.name, first.where, len(ops), int(mine.sum()) // len(ops), first.read,
                   float(sum(a[:, 3].max() - a[:, 0].min() for a in each)), float(self.wait[mine].mean()),
                   float(waited.mean()) if len(waited) else 0.0, prologue, core, epilogue,
                   float(np.mean([a[:, 3].max() - a[:, 3].min() for a in each])))  # fmt: skip

    def spent(self) -> np.ndarray:
        """us of every worker for each of `PARTS`: [workers, 6]. Rows add up to `total`."""
        out = np.zeros((self.workers, len(PARTS)))
        for p in range(3):
            np.add.at(out[:, p], self.worker, self.at[:, p + 1] - self.at[:, p])
        first, last = np.full(self.workers, self.total), np.zeros(self.workers)
        np.minimum.at(first, self.worker, self.at[:, 0])
        np.maximum.at(last, self.worker, self.at[:, 3])
        out[:, 4], out[:, 5] = first, np.where(last > 0, self.total - last, 0.0)
        out[:, 3] = self.total - out.sum(1)
        return out

    def table(self) -> str:
        """Rows as text, and what the workers' time went to."""
        head = (
            *"operator calls tasks read".split(),
            "span us",
            *"GB/s wait hop prologue core epilogue skew".split(),
            "",
        )
        rows = [head, *(self._cells(r) for r in self.rows())]
        return f"{self._summary()}\n\n{text.table(rows, left=(0, len(head) - 1))}"

    def _summary(self) -> str:
        spent, total = self.spent(), max(self.total, 1e-9)
        share = ", ".join(f"{n} {x:.0%}" for n, x in zip(PARTS, spent.mean(0) / total, strict=True))
        busy = spent[:, :3].sum(1)
        return (f"{self.name} on {self.platform}: {self.total:.1f} us from the first task to the last, {len(self.op)} tasks on "
                f"{self.workers} workers\na worker's time: {share}; busy from {busy.min() / total:.0%} to {busy.max() / total:.0%}")  # fmt: skip

    @staticmethod
    def _cells(r: Row) -> tuple[str, ...]:
        rate = 1e-3 * r.read * r.calls / r.span if r.span else 0.0
        times = (r.wait, r.hop, r.prologue, r.core, r.epilogue, r.skew)
        return (r.name, str(r.calls), str(r.tasks), f"{text.size(r.read)}B", f"{r.span:.1f}", f"{rate:.0f}",
                *(f"{x:.2f}" for x in times), r.where)  # fmt: skip

    __str__ = table

    def trace(self, file: Any = None) -> str:
        """The launch as JSON for Perfetto or chrome://tracing, a track a worker; also written to the path `file`."""
        return text.written(timeline.trace(self), file)

    def svg(self, file: Any = None) -> str:
        """The launch as a picture, a line a worker, that needs no network; also written to the path `file`."""
        return text.written(timeline.svg(self), file)


def profile(p: abi.Program, platform: str, name: str, at: np.ndarray, worker: np.ndarray, where: dict[str, str],
            read: dict[str, int]) -> Profile:  # fmt: skip
    """The profile of a launch. at: [task records, 4] in ns of any clock, stages that a kind does not have anywhere outside
    of the task; worker: who ran each. where, read: by the name of an operator."""
    at = at.astype(np.int64)
    for stage in (1, 2):
        kept = (at[:, stage] >= at[:, stage - 1]) & (at[:, stage] <= at[:, 3])
        at[:, stage] = np.where(kept, at[:, stage], at[:, stage - 1])
    us = (at - at[:, 0].min(initial=2**62)) / 1e3 if len(at) else np.zeros((0, 4))
    worker = worker.astype(np.int64)
    wait, ready = _since(us, worker), _needed(p, us)
    began = us[:, 0]
    hop = np.where((ready >= began - wait - 1e-9) & (ready >= 0), np.maximum(began - ready, 0.0), 0.0)
    tasks = p["Task"]
    operators = tuple(_operators(p, where, read))
    return Profile(name, platform, int(max(p.header["workers"], worker.max(initial=0) + 1)), operators, tasks["op"].astype(np.int64),
                   tasks["index"].astype(np.int64), tasks["part"].astype(np.int64), worker, us, wait, hop)  # fmt: skip


def _operators(p: abi.Program, where: dict[str, str], read: dict[str, int]) -> Iterator[Operator]:
    for op in p["Op"]:
        name = p.name(int(op["name"]))
        kind = abi.ENUMS["Kind"][int(op["kind"])].lower()
        yield Operator(name, kind, where.get(name, ""), read.get(name, 0), abi.structure(op))


def _since(us: np.ndarray, worker: np.ndarray) -> np.ndarray:
    """For every task the time since its worker's task before, or since the beginning."""
    order = np.lexsort((us[:, 0], worker))
    out = us[order, 0].copy()
    same = worker[order][1:] == worker[order][:-1]
    out[1:][same] -= us[order, 3][:-1][same]
    wait = np.empty(len(us))
    wait[order] = np.maximum(out, 0.0)
    return wait


def _needed(p: abi.Program, us: np.ndarray) -> np.ndarray:
    """For every task when the last of those that it waits for had ended; -1 where it waits for none."""
    tasks = p["Task"]
    order = np.lexsort((tasks["index"], tasks["op"]))
    same = np.flatnonzero(np.r_[True, np.any([np.diff(tasks[f][order]) != 0 for f in ("op", "index")], axis=0)])
    end = np.empty(len(tasks))  # parts of a task trigger when the last of them ends
    for group in np.split(order, same[1:]):
        end[group] = us[group, 3].max(initial=0.0)
    ends: dict[int, list[float]] = collections.defaultdict(list)
    for n in order[same] if len(order) else ():
        for e in tasks["trigger"][n][: tasks["n_triggers"][n]]:
            ends[int(e)].append(end[n])
    ordered = {e: np.sort(x) for e, x in ends.items()}
    out = np.full(len(tasks), -1.0)
    for n, t in enumerate(tasks):
        k = int(t["n_waits"])
        out[n] = max(
            (ordered[int(e)][int(w) - 1] for e, w in zip(t["wait"][:k], t["want"][:k], strict=True)), default=-1.0
        )
    return out
