"""What soundness means, byte by byte: a set of bytes is an integer with one bit a byte. For small graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from jax_mpk.ir.tasks import READ, WRITE, TaskGraph


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
