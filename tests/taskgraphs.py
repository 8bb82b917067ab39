"""Random task graphs that are sound, damages that may make them unsound, and an oracle that says which.

Nothing here uses the compiler passes or the verifier. The oracle is the definition, byte by byte: a set of bytes is an
integer with one bit a byte. `damages` works on any task graph, that of a real model included.

    python -m tests.taskgraphs            time the verifier on a graph like that of Qwen3-8B
    python -m tests.taskgraphs SEED       print the random graph with this seed
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from jax_mpk.ir.tasks import BOX_RANK, READ, UPDATE, WRITE, Boxes, Buffer, Csr, Grid, TaskGraph

MAX = 4
"""Waits and triggers that fit a task record."""


class Builder:
    """Collects grids, boxes and events one by one."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.grids: list[Grid] = []
        self.boxes: list[tuple] = []
        self.waits: list[list[int]] = []
        self.triggers: list[list[int]] = []
        self.tasks = self.events = self.workspace = 0

    def buffer(self, space: str, nbytes: int, name: str = "", alias: int = -1, offset: int = -1) -> int:
        index = sum(b.space == space for b in self.buffers)
        if space == "workspace":
            offset = self.workspace if offset < 0 else offset
            self.workspace = max(self.workspace, offset + nbytes)
        if space == "const":
            offset = sum(b.nbytes for b in self.buffers if b.space == "const")
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


# --- the oracle -------------------------------------------------------------------------------------------------------


@dataclass
class Touch:
    """One box as the oracle sees it: `own` has the bytes of the buffer, `at` the bytes of the machine."""

    mode: int
    buffer: int
    own: int
    at: int


def touches(tg: TaskGraph) -> list[list[Touch]]:
    """Per task its boxes. Buffers lie one after the other in the machine, those of the workspace where the plan says."""
    base, end = [], tg.workspace
    for b in tg.buffers:
        base.append(b.offset if b.space == "workspace" else end)
        end += 0 if b.space == "workspace" else b.nbytes
    out: list[list[Touch]] = [[] for _ in range(tg.tasks)]
    x = tg.boxes
    rows = zip(*(a.tolist() for a in (x.task, x.buffer, x.mode, x.offset, x.run, x.count, x.stride)), strict=True)
    for task, buffer, mode, offset, run, count, stride in rows:
        own, lowest = _bits(run, tuple(count), tuple(stride))
        own <<= offset + lowest
        out[task].append(Touch(mode, buffer, own, own << base[buffer]))
    return out


@lru_cache(1 << 14)
def _bits(run: int, count: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int]:
    """The bytes of a box, from the lowest one on, and where that one is."""
    bits, lowest = (1 << run) - 1, 0
    for c, s in zip(count, stride, strict=True):
        if c > 1:
            bits = sum_of(bits << j * abs(s) for j in range(c))
            lowest += min(0, (c - 1) * s)
    return bits, lowest


def ancestors(tg: TaskGraph) -> list[int] | str:
    """Per task the set of tasks that are done when it starts; text if some event cannot fire or is awaited too early."""
    producers: list[list[int]] = [[] for _ in range(tg.events)]
    for t in range(tg.tasks):
        for e in tg.triggers.row(t).tolist():
            producers[e].append(t)
    if any(len(p) != n for p, n in zip(producers, tg.threshold.tolist(), strict=True)):
        return "threshold"
    done, seen = [0] * tg.tasks, 0
    for t in tg.order.tolist():
        for e in tg.waits.row(t).tolist():
            if not producers[e]:
                return "nobody triggers an awaited event"
            for p in producers[e]:
                if not seen >> p & 1:
                    return "deadlock"
                done[t] |= done[p] | 1 << p
        seen |= 1 << t
    return done


def conflicts(touch: list[list[Touch]]) -> Iterator[tuple[int, int]]:
    """Pairs of tasks (in program order) that touch a byte of which one writes it."""
    every, writes = [0] * len(touch), [0] * len(touch)
    for t, row in enumerate(touch):
        for x in row:
            every[t] |= x.at
            writes[t] |= x.at if x.mode != READ else 0
    for b in range(len(touch)):
        for a in range(b):
            if every[a] & writes[b] or writes[a] & every[b]:
                yield a, b


def values(tg: TaskGraph, touch: list[list[Touch]]) -> str | None:
    """Run in program order, keeping for every buffer the bytes that hold what it was given."""
    held = [(1 << b.nbytes) - 1 if b.defined else 0 for b in tg.buffers]
    base = {b.id: b.offset for b in tg.buffers if b.space == "workspace"}
    written = [0] * len(tg.buffers)
    for t, row in enumerate(touch):
        attention = tg.grids[tg.grid_of[t]].kind == "attention"
        for x in row:
            appended = attention and x.mode == READ
            own = held[x.buffer] | sum_of(y.own for y in row if appended and y.mode == WRITE and y.buffer == x.buffer)
            if x.mode != WRITE and x.own & ~own:
                return f"task {t} reads undefined bytes"
        for n, x in enumerate(row):
            for y in row[:n]:
                if x.at & y.at and (x.mode or y.mode):
                    if x.buffer != y.buffer:
                        return f"task {t} uses bytes of two buffers"
                    if x.mode == y.mode == WRITE and x.own != y.own:
                        return f"task {t} writes bytes twice"
        writes = {(x.mode, x.buffer, x.own): x for x in row if x.mode != READ}.values()
        for x in writes:
            if x.mode == WRITE and not tg.buffers[x.buffer].defined and written[x.buffer] & x.own:
                return f"task {t} writes bytes again"
            for b, at in base.items():
                if b != x.buffer and x.buffer in base:
                    held[b] &= ~(x.at >> at)
            held[x.buffer] |= x.own
            written[x.buffer] |= x.own if x.mode == WRITE else 0
    for b in tg.buffers:
        if b.space == "result" and not b.defined and written[b.id] != (1 << b.nbytes) - 1:
            return f"result {b.index} is not complete"
    return None


def sum_of(sets: Iterator[int]) -> int:
    out = 0
    for s in sets:
        out |= s
    return out


def oracle(tg: TaskGraph) -> str | None:
    """Why a well-formed small task graph is unsound; None if it is sound."""
    done = ancestors(tg)
    if isinstance(done, str):
        return done
    touch = touches(tg)
    for a, b in conflicts(touch):
        if not done[b] >> a & 1:
            return f"tasks {a} and {b} are not ordered"
    return values(tg, touch)


# --- sound graphs -----------------------------------------------------------------------------------------------------


def sound(seed: int) -> TaskGraph:
    """A random sound task graph of 5 to 40 tasks."""
    rng = np.random.default_rng(seed)
    b = Builder()
    _program(b, rng)
    _plan(b, rng)
    touch = touches(b.build())
    before = [set() for _ in range(b.tasks)]
    for p, t in conflicts(touch):
        before[t].add(p)
    _events(b, before, rng)
    order = _legal_order(b, rng)
    workers = int(rng.integers(1, 5))
    return b.build(workers, order, rng.integers(0, workers, b.tasks).astype(np.int32))


def _pick(rng: np.random.Generator, options: list) -> object:
    return options[int(rng.integers(len(options)))]


def _cuts(rng: np.random.Generator, n: int, most: int) -> list[tuple[int, int]]:
    """Tiles [lo, hi) of n."""
    inner = sorted(set(rng.integers(1, n, int(rng.integers(0, most))).tolist())) if n > 1 else []
    return list(zip([0, *inner], [*inner, n], strict=True))


def _program(b: Builder, rng: np.random.Generator) -> None:
    """Operators on matrices of bytes: each writes a buffer by tiles or updates one in place, and reads others."""
    shape: dict[int, tuple[int, int]] = {}

    def matrix(space: str, alias: int = -1) -> int:
        rows, cols = int(rng.integers(1, 6)), int(rng.integers(1, 13))
        n = b.buffer(space, rows * cols, alias=alias)
        shape[n] = rows, cols
        return n

    for _ in range(int(rng.integers(1, 3))):
        matrix("arg")
    if rng.random() < 0.3:
        matrix("const")
    if rng.random() < 0.5:
        matrix("result", alias=7)
    ready = list(shape)
    target = int(rng.integers(5, 36))
    results = 0
    while b.tasks < target or not results:
        last = b.tasks >= target
        inplace = [n for n in ready if b.buffers[n].space in ("result", "workspace")]
        if inplace and rng.random() < 0.25 and not last:
            _update(b, rng, int(_pick(rng, inplace)), ready, shape)
            continue
        space = "result" if last or rng.random() < 0.15 else "workspace"
        results += space == "result"
        out = matrix(space)
        rows, cols = shape[out]
        tiles = [(r, c) for r in _cuts(rng, rows, 4) for c in _cuts(rng, cols, 4)]
        attention = rng.random() < 0.1
        for t, (r, c) in zip(
            b.grid(f"g{len(b.grids)}", len(tiles), "attention" if attention else "rows"), tiles, strict=True
        ):
            b.box(t, WRITE, out, *_tile(rng, shape[out], r, c))
            if attention:
                b.box(t, READ, out, *_tile(rng, shape[out], r, c))
            _reads(b, rng, t, ready, shape)
        ready.append(out)


def _tile(rng: np.random.Generator, shape: tuple[int, int], r: tuple[int, int], c: tuple[int, int]) -> tuple:
    """Rows r and columns c of a matrix as a box: there are several ways to write one."""
    cols = shape[1]
    (r0, r1), (c0, c1) = r, c
    if c1 - c0 == cols and rng.random() < 0.5:
        return r0 * cols, (r1 - r0) * cols
    rows = (r1 - r0, cols)
    if rng.random() < 0.2:
        return r0 * cols + c0, 1, rows, (c1 - c0, 1)
    if rng.random() < 0.2:
        return (r1 - 1) * cols + c0, c1 - c0, (r1 - r0, -cols)
    return r0 * cols + c0, c1 - c0, rows


def _part(rng: np.random.Generator, n: int) -> tuple[int, int]:
    if rng.random() < 0.4:
        return 0, n
    lo = int(rng.integers(n))
    return lo, int(rng.integers(lo, n)) + 1


def _reads(b: Builder, rng: np.random.Generator, t: int, ready: list[int], shape: dict[int, tuple[int, int]]) -> None:
    for _ in range(int(rng.integers(1, 4))):
        n = int(_pick(rng, ready[-4:] if rng.random() < 0.8 else ready))
        rows, cols = shape[n]
        if rng.random() < 0.15:  # every other byte, every other row
            b.box(t, READ, n, 0, 1, ((cols + 1) // 2, 2), ((rows + 1) // 2, 2 * cols))
        elif rng.random() < 0.1:  # a stride that is none of the matrix's
            step = int(rng.integers(2, 8))
            b.box(t, READ, n, 0, 1, ((rows * cols - 1) // step + 1, step))
        else:
            b.box(t, READ, n, *_tile(rng, shape[n], _part(rng, rows), _part(rng, cols)))


def _update(b: Builder, rng: np.random.Generator, n: int, ready: list[int], shape: dict[int, tuple[int, int]]) -> None:
    """In place: disjoint tiles, some of them left as they are."""
    rows, cols = shape[n]
    tiles = [(r, c) for r in _cuts(rng, rows, 3) for c in _cuts(rng, cols, 3) if rng.random() < 0.8]
    if not tiles:
        return
    mode = WRITE if b.buffers[n].alias >= 0 and rng.random() < 0.4 else UPDATE
    others = [x for x in ready if x != n]
    for t, (r, c) in zip(b.grid(f"u{len(b.grids)}", len(tiles)), tiles, strict=True):
        b.box(t, mode, n, *_tile(rng, shape[n], r, c))
        if rng.random() < 0.5:
            b.box(t, READ, n, *_tile(rng, shape[n], r, c))
        _reads(b, rng, t, others, shape)


def _plan(b: Builder, rng: np.random.Generator) -> None:
    """Let workspace buffers share bytes wherever a few random places happen to keep every value."""
    tg = b.build()
    for n, x in enumerate(b.buffers):
        if x.space != "workspace" or x.offset == 0 or rng.random() < 0.3:
            continue
        old = b.buffers[n]
        b.buffers[n] = replace(old, offset=int(rng.integers(0, x.offset)))
        tg = replace(tg, buffers=tuple(b.buffers))
        if values(tg, touches(tg)) is not None:
            b.buffers[n] = old
    b.workspace = max([x.offset + x.nbytes for x in b.buffers if x.space == "workspace"], default=0)


def _events(b: Builder, before: list[set[int]], rng: np.random.Generator) -> None:
    """Events for these dependencies: one per set of producers, or one per phase, as long as they fit the records."""
    ancestors = [0] * b.tasks
    need: list[frozenset[int]] = []
    for t, ps in enumerate(before):
        if rng.random() < 0.1 and t:
            ps.add(int(rng.integers(t)))
        for p in ps:
            ancestors[t] |= ancestors[p] | 1 << p
        need.append(frozenset(p for p in ps if not any(ancestors[q] >> p & 1 for q in ps)))
    phases: list[list[int]] = []  # stretches of the program without dependencies inside
    phase_of: list[int] = []
    for t, ps in enumerate(before):
        if not phases or not ps.isdisjoint(phases[-1]) or rng.random() < 0.1:
            phases.append([])
        phases[-1].append(t)
        phase_of.append(len(phases) - 1)
    by_phase = rng.random() < 0.4
    wanted: dict[frozenset[int], list[int]] = {}
    for t, ps in enumerate(need):
        if by_phase:
            for n in {phase_of[p] for p in ps} - {phase_of[t]}:
                wanted.setdefault(frozenset(phases[n]), []).append(t)
        elif ps:
            for p in _split(ps, rng) if rng.random() < 0.3 else [ps]:
                wanted.setdefault(p, []).append(t)
    if rng.random() < 0.15:  # one after the other: then only the values can be wrong
        wanted = {frozenset([t - 1]): [t] for t in range(1, b.tasks)}
    for producers, waiters in wanted.items():
        b.event(sorted(producers), waiters)
    if any(len(r) > MAX for r in (*b.waits, *b.triggers)):  # a barrier after each phase always fits
        b.waits, b.triggers, b.events = [[] for _ in b.waits], [[] for _ in b.triggers], 0
        for one, two in pairwise(phases):
            b.event(one, two)


def _split(ps: frozenset[int], rng: np.random.Generator) -> list[frozenset[int]]:
    left = frozenset(p for p in ps if rng.random() < 0.5)
    return [x for x in (left, ps - left) if x]


def _legal_order(b: Builder, rng: np.random.Generator) -> np.ndarray:
    missing = [0] * b.events
    waiters: list[list[int]] = [[] for _ in range(b.events)]
    for t in range(b.tasks):
        for e in b.triggers[t]:
            missing[e] += 1
        for e in b.waits[t]:
            waiters[e].append(t)
    blocked = [len(w) for w in b.waits]
    ready = [t for t in range(b.tasks) if not blocked[t]]
    order = []
    while ready:
        t = ready.pop(int(rng.integers(len(ready))))
        order.append(t)
        for e in b.triggers[t]:
            missing[e] -= 1
            if not missing[e]:
                for w in waiters[e]:
                    blocked[w] -= 1
                    if not blocked[w]:
                        ready.append(w)
    return np.array(order, np.int32)


# --- damages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """`fatal`: unsound whatever the graph is; otherwise it depends, and only the oracle knows."""

    name: str
    tg: TaskGraph
    fatal: bool


def damages(tg: TaskGraph, rng: np.random.Generator) -> Iterator[Damage]:
    """Every damage that applies to this graph, each at a random place. The graph must be complete and sound."""
    for i in rng.permutation(len(_DAMAGES)).tolist():
        damage, fatal = _DAMAGES[i]
        broken = damage(tg, rng)
        if broken is not None:
            yield Damage(damage.__name__, broken, fatal)


_DAMAGES: list[tuple[Callable[[TaskGraph, np.random.Generator], TaskGraph | None], bool]] = []


def _damage(fatal: bool) -> Callable:
    def register(f: Callable) -> Callable:
        _DAMAGES.append((f, fatal))
        return f

    return register


def _without(csr: Csr, k: int) -> Csr:
    row = int(csr.row_of()[k])
    start = csr.start.copy()
    start[row + 1 :] -= 1
    return Csr(start, np.delete(csr.data, k))


def _with(csr: Csr, row: int, value: int) -> Csr:
    start = csr.start.copy()
    start[row + 1 :] += 1
    return Csr(start, np.insert(csr.data, csr.start[row + 1], value))


def _has(csr: Csr, row: int, value: int) -> bool:
    return value in csr.row(row)


def _box(tg: TaskGraph, **columns: np.ndarray) -> TaskGraph:
    return replace(tg, boxes=replace(tg.boxes, **columns))


def _set(a: np.ndarray, at: int | tuple[int, int], value: int) -> np.ndarray:
    a = a.copy()
    a[at] = value
    return a


def _rows(tg: TaskGraph, rows: np.ndarray) -> TaskGraph:
    x = tg.boxes
    return replace(tg, boxes=Boxes(*(a[rows] for a in (x.task, x.buffer, x.mode, x.offset, x.run, x.count, x.stride))))


def _some(rng: np.random.Generator, which: np.ndarray) -> int:
    """A random index where `which` holds, -1 if there is none."""
    at = np.flatnonzero(which)
    return int(at[rng.integers(len(at))]) if len(at) else -1


def _fits(tg: TaskGraph, row: int) -> bool:
    x = tg.boxes
    reach = (x.count[row] - 1) * x.stride[row]
    lo = int(x.offset[row] + np.minimum(reach, 0).sum())
    hi = int(x.offset[row] + np.maximum(reach, 0).sum() + x.run[row])
    return 0 <= lo and hi <= tg.buffers[x.buffer[row]].nbytes


@_damage(fatal=False)
def wait_dropped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    if not len(tg.waits.data):
        return None
    return replace(tg, waits=_without(tg.waits, int(rng.integers(len(tg.waits.data)))))


@_damage(fatal=False)
def wait_moved(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task waits for another event instead."""
    if not len(tg.waits.data):
        return None
    k, e = int(rng.integers(len(tg.waits.data))), int(rng.integers(tg.events))
    if _has(tg.waits, int(tg.waits.row_of()[k]), e):
        return None
    return replace(tg, waits=Csr(tg.waits.start, _set(tg.waits.data, k, e)))


@_damage(fatal=True)
def trigger_dropped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    if not len(tg.triggers.data):
        return None
    return replace(tg, triggers=_without(tg.triggers, int(rng.integers(len(tg.triggers.data)))))


@_damage(fatal=False)
def producer_forgotten(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A trigger is dropped and the threshold agrees: the event no longer stands for that task."""
    if not len(tg.triggers.data):
        return None
    k = int(rng.integers(len(tg.triggers.data)))
    e = tg.triggers.data[k]
    return replace(tg, triggers=_without(tg.triggers, k), threshold=_set(tg.threshold, e, tg.threshold[e] - 1))


@_damage(fatal=True)
def trigger_moved(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task triggers another event instead."""
    if tg.events < 2 or not len(tg.triggers.data):
        return None
    k, e = int(rng.integers(len(tg.triggers.data))), int(rng.integers(tg.events))
    if _has(tg.triggers, int(tg.triggers.row_of()[k]), e):
        return None
    return replace(tg, triggers=Csr(tg.triggers.start, _set(tg.triggers.data, k, e)))


@_damage(fatal=False)
def trigger_of_another(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """Another task triggers the event: all counts are right."""
    if not len(tg.triggers.data):
        return None
    k, t = int(rng.integers(len(tg.triggers.data))), int(rng.integers(tg.tasks))
    e = int(tg.triggers.data[k])
    if _has(tg.triggers, t, e) or len(tg.triggers.row(t)) >= MAX:
        return None
    return replace(tg, triggers=_with(_without(tg.triggers, k), t, e))


@_damage(fatal=True)
def threshold_low(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    e = _some(rng, tg.threshold > 0)
    return None if e < 0 else replace(tg, threshold=_set(tg.threshold, e, tg.threshold[e] - 1))


@_damage(fatal=True)
def threshold_high(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    e = _some(rng, tg.threshold > 0)
    return None if e < 0 else replace(tg, threshold=_set(tg.threshold, e, tg.threshold[e] + 1))


@_damage(fatal=True)
def order_swapped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task and a producer that it waits for change places in the linear order."""
    if not len(tg.waits.data):
        return None
    k = int(rng.integers(len(tg.waits.data)))
    t, producers = int(tg.waits.row_of()[k]), tg.triggers.row_of()[tg.triggers.data == tg.waits.data[k]]
    position = np.empty(tg.tasks, np.int64)
    position[tg.order] = np.arange(tg.tasks)
    p = int(producers[rng.integers(len(producers))])
    order = tg.order.copy()
    order[position[t]], order[position[p]] = p, t
    return replace(tg, order=order)


@_damage(fatal=False)
def order_shuffled(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task moves to another place of the linear order, and so on its worker."""
    a, b = rng.integers(0, tg.tasks, 2)
    return replace(tg, order=np.insert(np.delete(tg.order, a), b, tg.order[a]))


@_damage(fatal=False)
def buffers_overlapped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """The memory plan puts a buffer where another one is."""
    inside = np.array([b.space == "workspace" for b in tg.buffers])
    a, b = _some(rng, inside), _some(rng, inside)
    if a == b or tg.buffers[a].offset + tg.buffers[b].nbytes > tg.workspace:
        return None
    buffers = list(tg.buffers)
    buffers[b] = replace(buffers[b], offset=buffers[a].offset)
    return replace(tg, buffers=tuple(buffers))


@_damage(fatal=False)
def box_widened(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = int(rng.integers(len(tg.boxes)))
    more = int(rng.integers(1, max(2, tg.boxes.run[r])))
    dims = np.flatnonzero(tg.boxes.count[r] > 1)
    if len(dims) and rng.random() < 0.5:
        at = (r, int(dims[rng.integers(len(dims))]))
        out = _box(tg, count=_set(tg.boxes.count, at, tg.boxes.count[at] + 1))
    elif len(dims):  # wider pieces would overlap each other
        return None
    else:
        out = _box(tg, run=_set(tg.boxes.run, r, tg.boxes.run[r] + more))
    return out if _fits(out, r) else None


@_damage(fatal=False)
def box_moved(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = int(rng.integers(len(tg.boxes)))
    by = int(rng.integers(1, 1 + max(1, tg.boxes.run[r]))) * int(rng.choice([-1, 1]))
    out = _box(tg, offset=_set(tg.boxes.offset, r, tg.boxes.offset[r] + by))
    return out if _fits(out, r) else None


@_damage(fatal=False)
def write_narrowed(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = _some(rng, (tg.boxes.mode == WRITE) & (tg.boxes.run > 1))
    return None if r < 0 else _box(tg, run=_set(tg.boxes.run, r, tg.boxes.run[r] - 1))


@_damage(fatal=False)
def write_lost(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = _some(rng, tg.boxes.mode == WRITE)
    return None if r < 0 else _rows(tg, np.delete(np.arange(len(tg.boxes)), r))


@_damage(fatal=False)
def write_repeated(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """Another task writes the same box."""
    x = tg.boxes
    r, t = _some(rng, x.mode == WRITE), int(rng.integers(tg.tasks))
    if r < 0 or t == x.task[r]:
        return None
    task = np.append(x.task, np.int32(t))
    rows = np.argsort(task, kind="stable")
    return _rows(_box(_rows(tg, np.append(np.arange(len(x)), r)), task=task), rows)


@_damage(fatal=False)
def boxes_exchanged(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """Two tasks do each other's work."""
    a, b = rng.integers(0, tg.tasks, 2)
    task = tg.boxes.task.copy()
    task[tg.boxes.task == a], task[tg.boxes.task == b] = b, a
    rows = np.argsort(task, kind="stable")
    return _rows(_box(tg, task=task), rows)


@_damage(fatal=False)
def read_becomes_write(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    free = np.array([b.space in ("workspace", "result") for b in tg.buffers])
    r = _some(rng, (tg.boxes.mode == READ) & free[tg.boxes.buffer])
    return None if r < 0 else _box(tg, mode=_set(tg.boxes.mode, r, int(rng.integers(WRITE, UPDATE + 1))))


@_damage(fatal=False)
def write_becomes_read(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = _some(rng, tg.boxes.mode != READ)
    return None if r < 0 else _box(tg, mode=_set(tg.boxes.mode, r, READ))


@_damage(fatal=False)
def other_buffer(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task reads another buffer than it says."""
    r, b = _some(rng, tg.boxes.mode == READ), int(rng.integers(len(tg.buffers)))
    if r < 0 or b == tg.boxes.buffer[r]:
        return None
    out = _box(tg, buffer=_set(tg.boxes.buffer, r, b))
    return out if _fits(out, r) else None


# --- a large graph ----------------------------------------------------------------------------------------------------


def decoder(layers: int = 36, batch: int = 16, context: int = 1024) -> TaskGraph:
    """A decode step with the shapes of Qwen3-8B (bf16) as the compiler would make it: 31,000 tasks, 145,000 boxes.

    Per layer: QKV, attention with cache appends, O, gate and up, down split in four with a reduction. Weights are
    row-major (contracted axis first), a task takes 64 columns. Two sets of activations take turns in the workspace.
    """
    hidden, heads, groups, head, inner, vocabulary, tile = 4096, 32, 8, 128, 12288, 151936, 64
    b = Builder()
    x = b.buffer("arg", batch * hidden * 2, "x")
    norm_arg = b.buffer("arg", hidden * 2, "norm")
    position = b.buffer("arg", batch * 4, "position")
    previous: range = range(0)

    def columns(t: int, mode: int, buffer: int, n: int, width: int, rows: int, size: int = 2, step: int = tile) -> None:
        b.box(t, mode, buffer, n * step * size, step * size, (rows, width * size))

    def matmul(name: str, weights: list[int], k: int, n: int, source: int, out: int, residual: int = -1) -> range:
        tasks = b.grid(name, n // tile, "contract")
        for i, t in enumerate(tasks):
            b.box(t, READ, source, 0, batch * k * 2)
            b.box(t, READ, norm_arg, 0, hidden * 2)
            for w in weights:
                columns(t, READ, w, i, n, k)
            if residual >= 0:
                columns(t, READ, residual, i, n, batch)
            columns(t, WRITE, out, i, n, batch)
        return tasks

    for layer in range(layers):
        at = (layer % 2) * (1 << 23)

        def work(name: str, nbytes: int, layer: int = layer) -> int:
            nonlocal at
            at += nbytes
            return b.buffer("workspace", nbytes, f"{name}{layer}", offset=at - nbytes)

        qkv_n = (heads + 2 * groups) * head
        weight = {n: b.buffer("arg", s, f"{n}{layer}") for n, s in (
            ("wqkv", hidden * qkv_n * 2), ("wo", heads * head * hidden * 2), ("wgate", hidden * inner * 2),
            ("wup", hidden * inner * 2), ("wdown", inner * hidden * 2))}  # fmt: skip
        cache = [b.buffer("result", batch * context * groups * head * 2, f"{n}{layer}", alias=1000 + 2 * layer + i)
                 for i, n in enumerate("kv")]  # fmt: skip
        qkv, att, mid = (
            work("qkv", batch * qkv_n * 2),
            work("att", batch * heads * head * 2),
            work("mid", batch * hidden * 2),
        )
        act, part, out = (
            work("act", batch * inner * 2),
            work("part", 4 * batch * hidden * 4),
            work("x", batch * hidden * 2),
        )

        a = matmul("qkv", [weight["wqkv"]], hidden, qkv_n, x, qkv)
        if len(previous):
            b.event(previous, a)
        c = b.grid("attention", batch * groups, "attention")
        for i, t in enumerate(c):
            row, g = divmod(i, groups)
            span = heads // groups * head * 2
            b.box(t, READ, position, row * 4, 4)
            b.box(t, READ, qkv, row * qkv_n * 2 + g * span, span)
            for n, buf in enumerate(cache):
                b.box(t, READ, qkv, (row * qkv_n + (heads + n * groups + g) * head) * 2, head * 2)
                where = (row * context * groups + g) * head * 2
                b.box(t, UPDATE, buf, where, head * 2, (context, groups * head * 2))
                b.box(t, READ, buf, where, head * 2, (context, groups * head * 2))
            b.box(t, WRITE, att, row * heads * head * 2 + g * span, span)
        for g in range(groups):
            per = heads // groups * head // tile
            q = [a[g * per + n] for n in range(per)]
            kv = [a[(heads + s * groups + g) * head // tile + n] for s in range(2) for n in range(head // tile)]
            b.event(q + kv, [c[row * groups + g] for row in range(batch)])
        d = matmul("o", [weight["wo"]], heads * head, hidden, att, mid, residual=x)
        b.event(c, d)
        e = matmul("gate_up", [weight["wgate"], weight["wup"]], hidden, inner, mid, act)
        b.event(d, e)
        f = b.grid("down", 4 * hidden // tile, "contract")
        for i, t in enumerate(f):
            s, n = divmod(i, hidden // tile)
            k = inner // 4
            b.box(t, READ, act, s * k * 2, k * 2, (batch, inner * 2))
            b.box(t, READ, weight["wdown"], (s * k * hidden + n * tile) * 2, tile * 2, (k, hidden * 2))
            b.box(t, WRITE, part, (s * batch * hidden + n * tile) * 4, tile * 4, (batch, hidden * 4))
        for s in range(4):
            b.event(e[s * len(e) // 4 : (s + 1) * len(e) // 4], f[s * len(f) // 4 : (s + 1) * len(f) // 4])
        h = b.grid("sum", hidden // tile)
        for i, t in enumerate(h):
            b.box(t, READ, part, i * tile * 4, tile * 4, (batch, hidden * 4), (4, batch * hidden * 4))
            columns(t, READ, mid, i, hidden, batch)
            columns(t, WRITE, out, i, hidden, batch)
            b.event([f[s * len(h) + i] for s in range(4)], [t])
        x, previous = out, h
    logits = b.buffer("result", batch * vocabulary * 2, "logits")
    b.event(
        previous, matmul("logits", [b.buffer("arg", hidden * vocabulary * 2, "head")], hidden, vocabulary, x, logits)
    )
    return b.build(workers=132)


def main() -> None:
    if len(sys.argv) > 1:
        print(sound(int(sys.argv[1])))
        return
    from jax_mpk.verify import verify

    for name, make in {"Qwen3-8B, batch 16": decoder, "batch 1": lambda: decoder(batch=1),
                       "120 layers": lambda: decoder(layers=120)}.items():  # fmt: skip
        tg = make()
        start = time.perf_counter()
        certificate = verify(tg)
        print(f"{name}: {time.perf_counter() - start:.2f} s for {len(tg.boxes)} boxes; {certificate}")


if __name__ == "__main__":
    main()
