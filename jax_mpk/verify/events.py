"""Do the events fire, without deadlock, and which tasks do they order?"""

from __future__ import annotations

import numpy as np

from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import Csr, TaskGraph
from jax_mpk.verify.boxes import distinct


def check(tg: TaskGraph) -> Before:
    """Thresholds and freedom from deadlock; returns the order that the events enforce."""
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
    others = np.setdiff1d(producers, waiters)  # two different tasks say more
    names = [tg.task_name((p if len(p) else q)[-1]) + verb for p, q, verb in (
        (others, producers, " triggers it"), (waiters, waiters, " waits for it")) if len(q)]  # fmt: skip
    return (f"event {e}: {triggers} tasks trigger it and its threshold is {tg.threshold[e]}: "
            f"{', '.join(names) or 'nobody uses it'}")  # fmt: skip


class Before:
    """Happens-before through events alone: it holds on any number of workers that keep the linear order or not.

    Tasks that wait for the same events form one *wait class*, those that trigger the same ones a *trigger class*; the
    relation depends on the classes only. Per wait class there is the set of all events that must have fired, as the
    bits of one integer: Python's are as long as needed, and the fastest way to unite sets of thousands of events.
    """

    def __init__(self, tg: TaskGraph, last: np.ndarray):
        wait_first, self.wait = distinct(_padded(tg.waits))
        trigger_first, self.trigger = distinct(_padded(tg.triggers))
        waits = [tg.waits.row(t).tolist() for t in wait_first]
        self._fires = [sum(1 << e for e in tg.triggers.row(t).tolist()) for t in trigger_first]
        self._awaited: list[int] = [0] * len(waits)
        producers = Csr.from_pairs(tg.triggers.data, self.wait[tg.triggers.row_of()], tg.events)
        fired = [0] * tg.events  # event -> it, and all that fire before it
        ready = [False] * len(waits)
        # Whoever triggers an event runs after everybody who triggers what it waits for: `last` is a topological order.
        for e in np.argsort(last, kind="stable").tolist():
            bits = 1 << e
            for w in producers.row(e).tolist():
                if not ready[w]:
                    self._collect(w, waits[w], fired)
                    ready[w] = True
                bits |= self._awaited[w]
            fired[e] = bits
        for w in range(len(waits)):
            if not ready[w]:
                self._collect(w, waits[w], fired)

    def _collect(self, w: int, events: list[int], fired: list[int]) -> None:
        for e in events:  # most wait for one event: no copy of its set
            self._awaited[w] = self._awaited[w] | fired[e] if self._awaited[w] else fired[e]

    def holds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """For each pair of tasks: has a[i] finished whenever b[i] starts?"""
        n = len(self._awaited)
        key, inverse = np.unique(self.trigger[a] * n + self.wait[b], return_inverse=True)
        fires, awaited = self._fires, self._awaited
        held = [fires[k // n] & awaited[k % n] != 0 for k in key.tolist()]
        return np.array(held, bool)[inverse]

    def common(self, tasks: np.ndarray) -> int:
        """The events that have fired whenever any of these tasks starts."""
        out = -1
        for w in np.unique(self.wait[tasks]).tolist():
            out &= self._awaited[w]
        return out

    def fires(self, tasks: np.ndarray) -> list[int]:
        """The sets of events that these tasks trigger, each set once."""
        return [self._fires[t] for t in np.unique(self.trigger[tasks]).tolist()]


def _padded(csr: Csr) -> list[np.ndarray]:
    """The rows of a Csr as sorted columns, padded with -1."""
    n = np.diff(csr.start)
    table = np.full((csr.rows, max(1, int(n.max(initial=0)))), -1, np.int64)
    row = csr.row_of()
    table[row, np.arange(len(csr.data)) - csr.start[row]] = csr.data
    table.sort(axis=1)
    return list(table.T)
