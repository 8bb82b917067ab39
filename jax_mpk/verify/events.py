"""Do the events fire, without deadlock, and which tasks do they order?"""

from __future__ import annotations

import functools

import numpy as np

from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import Csr, TaskGraph
from jax_mpk.verify.boxes import distinct


def check(tg: TaskGraph) -> Before:
    """Thresholds and freedom from deadlock; returns the order that the events enforce."""
    assert tg.waits is not None and tg.triggers is not None and tg.order is not None
    producer, made = tg.triggers.row_of(), tg.triggers.data
    waiter, wanted = tg.waits.row_of(), tg.waits.data
    triggers = np.bincount(made, minlength=tg.events)

    dead = np.zeros(tg.events, bool)
    dead[wanted] = True
    for e in np.flatnonzero((triggers != tg.threshold) | (dead & (triggers == 0)))[:1]:
        raise VerifyError(_miscounted(tg, int(e), int(triggers[e]), producer[made == e], waiter[wanted == e]))
    position = np.empty(tg.tasks, np.int64)
    position[tg.order] = np.arange(tg.tasks)
    last = np.full(tg.events, -1, np.int64)
    np.maximum.at(last, made, position[producer])
    for k in np.flatnonzero(last[wanted] >= position[waiter])[:1]:
        e, t = wanted[k], waiter[k]
        p = tg.order[last[e]]
        raise VerifyError(
            f"deadlock: {tg.task_name(t)} at position {position[t]} of the linear order waits for event {e}, which "
            f"{tg.task_name(p)} at position {last[e]} triggers"
        )
    return Before(tg, last)


def _miscounted(tg: TaskGraph, e: int, triggers: int, producers: np.ndarray, waiters: np.ndarray) -> str:
    assert tg.threshold is not None
    others = np.setdiff1d(producers, waiters)  # two different tasks say more
    names = [tg.task_name((p if len(p) else q)[-1]) + verb for p, q, verb in (
        (others, producers, " triggers it"), (waiters, waiters, " waits for it")) if len(q)]  # fmt: skip
    return (f"event {e}: {triggers} tasks trigger it and its threshold is {tg.threshold[e]}: "
            f"{', '.join(names) or 'nobody uses it'}")  # fmt: skip


class Before:
    """Happens-before through events alone: it holds on any number of workers that keep the linear order or not.

    Tasks that wait for the same events form one *wait class*, those that trigger the same ones a *trigger class*; the
    relation depends on the classes only. Per wait class there is the set of all events that must have fired. Events
    are ranked in topological order, so that such a set is nearly all ranks up to some point (see `Ranks`).
    """

    def __init__(self, tg: TaskGraph, last: np.ndarray):
        assert tg.waits is not None and tg.triggers is not None
        waits, triggers = _padded(tg.waits), _padded(tg.triggers)
        wait_first, self.wait = distinct(waits)
        trigger_first, self.trigger = distinct(triggers)
        # Whoever triggers an event runs after everybody who triggers what it waits for: `last` is a topological order.
        awaited = np.zeros(tg.events, bool)
        awaited[tg.waits.data] = True
        order = np.argsort(last, kind="stable")
        order = order[awaited[order]]
        rank = np.full(tg.events, len(order))  # of events that nobody waits for: in no set
        rank[order] = np.arange(len(order))
        rank = np.append(rank, -1)  # of the padding
        awaits = [[r for r in row if r >= 0] for row in rank[np.stack(waits, 1)[wait_first]].tolist()]
        self._fires = rank[np.stack(triggers, 1)[trigger_first]]
        sets: list[Ranks | None] = [None] * len(awaits)
        fired: list[Ranks] = []  # by rank: the event, and all that fire before it

        def collect(w: int) -> Ranks:
            hit = sets[w]
            if hit is None:
                sets[w] = hit = functools.reduce(union, [fired[r] for r in awaits[w]], NOTHING)
            return hit

        by = Csr.from_pairs(tg.triggers.data, self.wait[tg.triggers.row_of()], tg.events)
        start, producers = by.start.tolist(), by.data.tolist()
        for r, e in enumerate(order.tolist()):
            before = functools.reduce(union, map(collect, producers[start[e] : start[e + 1]]), NOTHING)
            fired.append(packed(before[0], before[1] | 1 << r - before[0]))
        self._awaited = [collect(w) for w in range(len(awaits))]
        # The same for whole arrays of tasks: floors, and the bits of all sets one after the other.
        self._floor = np.array([floor for floor, _ in self._awaited], np.int64)
        packed_bits = [bits.to_bytes(bits.bit_length() + 7 >> 3, "little") for _, bits in self._awaited]
        self._start = np.cumsum([0, *map(len, packed_bits)])
        self._bits = np.frombuffer(b"".join(packed_bits) + b"\0", np.uint8)

    def holds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """For each pair of tasks: has a[i] finished whenever b[i] starts?"""
        out, left = np.zeros(len(a), bool), np.arange(len(a))
        for ranks in self._fires.T:
            rank, w = ranks[self.trigger[a[left]]], self.wait[b[left]]
            above = rank - self._floor[w]
            at = self._start[w] + (above >> 3)
            known = (rank >= 0) & (at < self._start[w + 1])
            at[~known | (above < 0)] = len(self._bits) - 1
            hit = known & ((above < 0) | (self._bits[at] >> (above & 7).astype(np.uint8) & 1 > 0))
            out[left[hit]] = True
            left = left[~hit]
        return out

    def common(self, tasks: np.ndarray) -> Ranks:
        """The events that have fired whenever any of these tasks starts."""
        classes: list[int] = np.unique(self.wait[tasks]).tolist()
        return functools.reduce(intersection, [self._awaited[w] for w in classes])

    def fires(self, tasks: np.ndarray) -> list[list[int]]:
        """The sets of events that these tasks trigger, each set once."""
        return [[r for r in row if r >= 0] for row in self._fires[np.unique(self.trigger[tasks])].tolist()]


Ranks = tuple[int, int]
"""A set of ranks: `(floor, bits)` are all ranks below `floor`, and `floor + n` for every bit n of `bits`. Few bits are
needed, and Python's integers are the fastest way to unite sets of any number of them."""

NOTHING: Ranks = (0, 0)


def packed(floor: int, bits: int) -> Ranks:
    """The set with its floor as high as possible."""
    full = (~bits & bits + 1).bit_length() - 1  # the lowest bit that is not set
    return floor + full, bits >> full


def union(a: Ranks, b: Ranks) -> Ranks:
    """Ranks of either set."""
    (floor, bits), (low, more) = (a, b) if a[0] >= b[0] else (b, a)
    return packed(floor, bits | more >> floor - low)


def intersection(a: Ranks, b: Ranks) -> Ranks:
    """Ranks of both sets."""
    (low, bits), (floor, more) = (a, b) if a[0] <= b[0] else (b, a)
    up = floor - low
    return low, bits & (more << up | (1 << up) - 1)


def meets(ranks: list[int], s: Ranks) -> bool:
    """Whether some of the ranks are in the set."""
    return any(r < s[0] or s[1] >> r - s[0] & 1 for r in ranks)


def _padded(csr: Csr) -> list[np.ndarray]:
    """The rows of a Csr as sorted columns, padded with -1."""
    n = np.diff(csr.start)
    table = np.full((csr.rows, max(1, int(n.max(initial=0)))), -1, np.int64)
    row = csr.row_of()
    table[row, np.arange(len(csr.data)) - csr.start[row]] = csr.data
    table.sort(axis=1)
    return list(table.T)
