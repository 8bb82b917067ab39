"""Random sound task graphs: forks, joins, strided boxes, updates in place, shared bytes, any legal order."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from jax_mpk.ir.tasks import READ, UPDATE, WRITE, TaskGraph
from tests.taskgraphs.builder import MAX, Builder
from tests.taskgraphs.oracle import conflicts, touches, values


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
