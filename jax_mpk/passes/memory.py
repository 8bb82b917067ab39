"""Memory plan: where the temporaries live in the workspace, and the constants in their section.

A buffer may take the bytes of another one when every task that touches the old one is ordered before every task that
touches the new one by the dependencies alone: the plan then holds for any assignment of tasks to any number of workers.
It is decided per operator: "all tasks of x before all tasks of y" (`precedence`). Rows of a batch that never meet are
ordered row by row only; then (`_Rows`) a buffer may take exactly the place of one of its size, if every two tasks that
would touch a common byte are ordered. Reuse never adds a dependency.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mpk.ir.boxes import ragged
from jax_mpk.ir.tasks import Buffer, TaskGraph
from jax_mpk.passes.dependencies import Access, accesses, overlap
from jax_mpk.passes.relations import EMPTY, Reach, Relations

ALIGN = 64
SLACK = 2
"""Row-by-row reuse is tried when the plan needs more than this many times what one worker in program order needs."""
SLOTS = 8
"""Places tried for a buffer in row-by-row reuse."""


def run(tg: TaskGraph) -> TaskGraph:
    """`tg` with the offsets of workspace and constant buffers, and the size of the workspace."""
    users = _users(tg)
    before = precedence(tg)
    temps = [b for b in tg.buffers if b.space == "workspace"]
    temps.sort(key=lambda b: (-_padded(b.nbytes), users[b.id] & -users[b.id], b.id))
    offset, workspace = _plan(temps, users, before, None)
    if workspace > SLACK * _sequential(temps, users):
        other = _plan(temps, users, before, _Rows(tg))
        offset, workspace = min((offset, workspace), other, key=lambda p: p[1])
    at = 0
    for b in tg.buffers:
        if b.space == "const":
            offset[b.id] = at
            at += _padded(b.nbytes)
    buffers = tuple(replace(b, offset=offset.get(b.id, b.offset)) for b in tg.buffers)
    return replace(tg, buffers=buffers, workspace=workspace)


def _users(tg: TaskGraph) -> list[int]:
    """Per buffer, the bit set of grids that touch it."""
    buffers = max(1, len(tg.buffers))
    users = [0] * buffers
    pairs = tg.grid_of[tg.boxes.task].astype(np.int64) * buffers + tg.boxes.buffer
    for pair in np.flatnonzero(np.bincount(pairs)).tolist():
        users[pair % buffers] |= 1 << pair // buffers
    return users


def _plan(temps: list[Buffer], users: list[int], before: list[int], rows: _Rows | None) -> tuple[dict[int, int], int]:
    """Greedy best fit, largest first, equal sizes in program order: offsets and the size of the workspace."""
    used = _words([users[b.id] for b in temps], len(before))
    ready = _words([_meet(users[b.id], before) for b in temps], len(before))  # grids before every user of the buffer
    nbytes = np.array([b.nbytes for b in temps], np.int64)
    size, start = -(-nbytes // ALIGN) * ALIGN, np.zeros(len(temps), np.int64)
    slots: dict[int, dict[int, Buffer]] = {}  # size -> offset -> the last buffer of that size there
    peak = 0
    for n, (b, need) in enumerate(zip(temps, size.tolist(), strict=True)):
        taken = (used[:n] & ~ready[n]).any(1) & (used[n] & ~ready[:n]).any(1)
        lo, hi, held = start[:n][taken], (start + size)[:n][taken], nbytes[:n][taken]
        at = _best(lo, hi, need)
        mine = slots.setdefault(need, {})
        if rows is not None and at + need > peak:
            for there, last in list(mine.items())[-SLOTS:]:
                other = (lo != there) | (hi != there + need) | (held > last.nbytes)
                clear = not (other & (lo < there + need) & (there < hi)).any()
                if clear and rows.ordered(last, b):
                    at = there
                    break
        start[n] = at
        mine.pop(at, None)
        mine[at] = b
        peak = max(peak, at + need)
    return {b.id: at for b, at in zip(temps, start.tolist(), strict=True)}, peak


def _words(sets: list[int], bits: int) -> np.ndarray:
    """Sets of so many bits as rows of words."""
    words = max(1, -(-bits // 64))
    return np.frombuffer(b"".join(s.to_bytes(8 * words, "little") for s in sets), np.uint64).reshape(-1, words)


def _sequential(temps: list[Buffer], users: list[int]) -> int:
    """The most bytes alive at once if the operators run one after the other."""
    change: dict[int, int] = {}
    for b in temps:
        if users[b.id]:
            first, end = (users[b.id] & -users[b.id]).bit_length() - 1, users[b.id].bit_length()
            change[first] = change.get(first, 0) + _padded(b.nbytes)
            change[end] = change.get(end, 0) - _padded(b.nbytes)
    alive = peak = 0
    for _, n in sorted(change.items()):
        alive += n
        peak = max(peak, alive)
    return peak


class _Rows:
    """Whether a buffer may take exactly the bytes of another: a task-by-task proof from boxes and dependencies."""

    def __init__(self, tg: TaskGraph) -> None:
        assert tg.deps is not None
        self._rel = Relations()
        self._reach = Reach(self._rel)
        self._memo: dict[tuple[int, int], int] = {}
        self._access: dict[int, list[tuple[int, Access]]] = {}
        for grid, buffer, access in accesses(tg):
            self._access.setdefault(buffer, []).append((grid, access))
        for g in tg.grids:
            start = tg.deps.start[g.first : g.first + g.count + 1]
            row = np.repeat(np.arange(g.count), np.diff(start))
            data = tg.deps.data[start[0] : start[-1]]
            source = tg.grid_of[data]
            edges = {}
            for u in np.flatnonzero(np.bincount(source)).tolist():
                m = np.zeros((g.count, tg.grids[u].count), bool)
                m[row[source == u], data[source == u] - tg.grids[u].first] = True
                edges[u] = self._rel.add(m)
            self._reach.push(edges)

    def ordered(self, old: Buffer, new: Buffer) -> bool:
        """Whether all that touch a byte of `old` precede all that touch the same byte of `new`.

        `old` must be written in whole by one operator: it then hides the buffers that had its place before.
        """
        first, second = self._access.get(old.id, []), self._access.get(new.id, [])
        if not any(a.covers and a.lo == 0 and a.hi == old.nbytes for _, a in first):
            return False
        for x, a in first:
            for y, b in second:
                if (a.writes or b.writes) and a.lo < b.hi and b.lo < a.hi:
                    key = (a.key, b.key)
                    if key not in self._memo:
                        self._memo[key] = self._rel.add(overlap(a, b))
                    clash = self._memo[key]
                    if clash != EMPTY and (x >= y or self._rel.minus(clash, self._reach.closure(x, y)) != EMPTY):
                        return False
        return True


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _meet(users: int, before: list[int]) -> int:
    out = -1 if users else 0
    while users:
        low = users & -users
        out &= before[low.bit_length() - 1]
        users ^= low
    return out


def _best(lo: np.ndarray, hi: np.ndarray, size: int) -> int:
    """The start of the smallest gap between the intervals [lo, hi) that fits, or the end of them all."""
    by = np.argsort(lo, kind="stable")
    reach = np.maximum.accumulate(np.concatenate([[0], hi[by]]))  # from where on the bytes before each are free
    gap = lo[by] - reach[:-1]
    fits = np.flatnonzero(gap >= size)
    return int(reach[fits[np.argmin(gap[fits])]] if len(fits) else reach[-1])


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
    base = np.cumsum(sizes[u]) - sizes[u]  # one mark per pair and task of u
    first = np.array([g.first for g in tg.grids], np.int64)
    marks = np.zeros(int(sizes[u].sum()), bool)
    marks[(base - first[u])[pair[some]][n] + tg.deps.data[at]] = True
    # Every task of u has a dependent in v.
    drains = full | (np.bincount(np.repeat(np.arange(len(u)), sizes[u]), marks, len(u)) == sizes[u])

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
