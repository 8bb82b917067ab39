"""Memory plan: where the temporaries live in the workspace, and the constants in their section.

A buffer may take the bytes of another one when every task that touches the old one is ordered before every task that
touches the new one by the dependencies alone: the plan then holds for any assignment of tasks to any number of workers.
It is decided per operator: "all tasks of x before all tasks of y" (`precedence`). Reuse never adds a dependency.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mpk.ir.tasks import Buffer, TaskGraph
from jax_mpk.passes.boxes import ragged

ALIGN = 64


def run(tg: TaskGraph) -> TaskGraph:
    """`tg` with the offsets of workspace and constant buffers, and the size of the workspace."""
    pair = np.unique(tg.grid_of[tg.boxes.task].astype(np.int64) * len(tg.buffers) + tg.boxes.buffer)
    users = [0] * len(tg.buffers)  # bit set of grids
    for g, b in zip((pair // max(1, len(tg.buffers))).tolist(), (pair % max(1, len(tg.buffers))).tolist(), strict=True):
        users[b] |= 1 << g
    before = precedence(tg)
    ready = [_meet(users[b.id], before) for b in tg.buffers]  # grids that precede every user of the buffer
    offset: dict[int, int] = {}
    placed: list[Buffer] = []
    for b in sorted((b for b in tg.buffers if b.space == "workspace"), key=lambda b: (-b.nbytes, b.id)):
        taken = [(offset[x.id], offset[x.id] + _padded(x.nbytes)) for x in placed
                 if users[x.id] & ~ready[b.id] and users[b.id] & ~ready[x.id]]  # fmt: skip
        offset[b.id] = _best(sorted(taken), _padded(b.nbytes))
        placed.append(b)
    workspace = max((offset[b.id] + _padded(b.nbytes) for b in placed), default=0)
    at = 0
    for b in tg.buffers:
        if b.space == "const":
            offset[b.id] = at
            at += _padded(b.nbytes)
    buffers = tuple(replace(b, offset=offset.get(b.id, b.offset)) for b in tg.buffers)
    return replace(tg, buffers=buffers, workspace=workspace)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _meet(users: int, before: list[int]) -> int:
    out = -1 if users else 0
    while users:
        low = users & -users
        out &= before[low.bit_length() - 1]
        users ^= low
    return out


def _best(taken: list[tuple[int, int]], size: int) -> int:
    """The start of the smallest gap that fits, or the end of everything taken."""
    best: tuple[int, int] | None = None
    at = 0
    for lo, hi in taken:
        if lo - at >= size and (best is None or lo - at < best[0]):
            best = (lo - at, at)
        at = max(at, hi)
    return at if best is None else best[1]


def precedence(tg: TaskGraph) -> list[int]:
    """Per grid, the bit set of grids all of whose tasks finish before any of its tasks starts, by the dependencies.

    Sufficient, not necessary: a complete edge u -> v (every task of v depends on every task of u), continued backward
    while every task of a grid has a dependent in the next one, and forward while every task has a dependency there.
    """
    assert tg.deps is not None
    grids, sizes = len(tg.grids), np.array([g.count for g in tg.grids], np.int64)
    row, source = tg.deps.row_of(), tg.grid_of[tg.deps.data]
    head = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(source, prepend=-1))  # runs: one task, one grid it needs
    length = np.diff(np.append(head, len(row)))
    key = source[head].astype(np.int64) * grids + tg.grid_of[row[head]]
    pairs, pair = np.unique(key, return_inverse=True)
    u, v = pairs // max(1, grids), pairs % max(1, grids)
    full = np.bincount(pair, length, len(pairs)) == sizes[u] * sizes[v]
    feeds = np.bincount(pair, minlength=len(pairs)) == sizes[v]  # every task of v depends on one of u
    some = np.flatnonzero(~full[pair])
    n, at = ragged(head[some], head[some] + length[some])
    ends = np.unique(pair[some][n].astype(np.int64) * (tg.tasks + 1) + tg.deps.data[at]) // (tg.tasks + 1)
    drains = full | (np.bincount(ends, minlength=len(pairs)) == sizes[u])  # every task of u has a dependent in v

    edge = list(zip(u.tolist(), v.tolist(), full.tolist(), drains.tolist(), feeds.tolist(), strict=True))
    drain = [1 << g for g in range(grids)]  # grids each of whose tasks leads to some task of g
    for x, y, _, d, _ in sorted(edge, key=lambda e: e[1]):
        if d and x < y:
            drain[y] |= drain[x]
    before = [0] * grids
    for x, y, f, _, fed in sorted(edge, key=lambda e: e[1]):
        if x < y:
            before[y] |= drain[x] if f else 0
            before[y] |= before[x] if fed else 0
    return before
