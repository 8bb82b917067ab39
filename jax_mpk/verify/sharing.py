"""Which buffers must be looked at together because the memory plan gave them the same bytes?

Mostly few: where the events put every access to one buffer before every access to the next one in the same bytes, there
is nothing to look at. And only successive users of a byte have to be compared: when all of `a` comes before all of `b`,
all of `b` before all of `c`, and `b` writes every byte of its place, then whoever uses a byte of `a` is before the task
of `b` that writes it, which is before whoever uses it as a byte of `c`.
"""

from __future__ import annotations

import numpy as np

from jax_mpk.ir.tasks import WRITE
from jax_mpk.verify.accesses import Accesses
from jax_mpk.verify.events import Before, Ranks, meets


def meetings(acc: Accesses, before: Before) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of buffers whose common bytes need a proof access by access; and those of them whose uses are not one after
    the other in program order. Every other pair of workspace buffers is in order if these are, and if no byte of a
    buffer is written twice."""
    spans = [(a, b) for a, b in acc.ranges() if acc.base[acc.buffer[a]] >= 0]
    if not spans:
        return [], []
    start = np.array([a for a, _ in spans])
    ends = np.array([b for _, b in spans])
    cells = np.concatenate([np.arange(a, b) for a, b in spans])
    at = np.cumsum(ends - start) - (ends - start)
    buffer = acc.buffer[start]
    lo = np.minimum.reduceat(acc.shape.offset[cells], at) + acc.base[buffer]
    hi = np.maximum.reduceat(acc.shape.end[cells], at) + acc.base[buffer]
    written = np.add.reduceat(np.where(acc.mode == WRITE, acc.shape.size, 0)[cells], at)
    whole = (written == hi - lo).tolist()  # its writes do not overlap, or it is rejected elsewhere
    group = acc.groups()
    first = np.array([acc.first[group[a] : group[b]].min() for a, b in spans])
    last = np.array([acc.last[group[a] : group[b]].max() for a, b in spans])
    by = np.argsort(first, kind="stable").tolist()

    cuts = np.unique(np.concatenate([lo, hi]))
    left, right = np.searchsorted(cuts, lo).tolist(), np.searchsorted(cuts, hi).tolist()
    # Per segment, the buffers that later ones must be compared with, each up to the last task of one that hides it.
    users: list[dict[int, float]] = [{} for _ in cuts]
    done = _Done(acc, before, [(int(group[a]), int(group[b])) for a, b in spans])
    needed, mixed = [], []
    began, ended = first.tolist(), last.tolist()
    for b in by:
        found = set()
        for here in users[left[b] : right[b]]:
            for a, until in list(here.items()):
                if until < began[b]:
                    del here[a]
                    continue
                found.add(a)
                if whole[b] and ended[a] < began[b]:
                    here[a] = min(until, ended[b])
            here[b] = float("inf")
        for a in sorted(found):
            pair = (int(buffer[a]), int(buffer[b]))
            if ended[a] >= began[b]:
                mixed.append(pair)
            elif done.separates(a, b):
                continue
            needed.append(pair)
    return needed, mixed


class _Done:
    """Whether all tasks that use one buffer have finished when any that uses another one starts."""

    def __init__(self, acc: Accesses, before: Before, groups: list[tuple[int, int]]):
        self._before = before
        self._tasks = [np.concatenate([acc.first[a:b], acc.last[a:b]]) for a, b in groups]  # one of each class
        self._common: dict[int, Ranks] = {}
        self._fires: dict[int, list[list[int]]] = {}

    def separates(self, a: int, b: int) -> bool:
        if b not in self._common:
            self._common[b] = self._before.common(self._tasks[b])
        if a not in self._fires:
            self._fires[a] = self._before.fires(self._tasks[a])
        return all(meets(ranks, self._common[b]) for ranks in self._fires[a])
