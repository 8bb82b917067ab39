"""How wide the tasks of contractions are: columns are dealt so that the busiest worker streams as little as can be."""

from __future__ import annotations

import functools
import heapq
import math


@functools.cache
def widths(columns: tuple[int, ...], batch: int, workers: int, unit: int, most: int) -> tuple[int, ...]:
    """Columns of a task of contractions that are dealt together, multiples of `unit` up to `most`.

    columns: of each contraction. batch: how often each comes (batches, slices of k, blocks of rows). Every contraction has
    the width that suits it alone (of equal ones the widest, for fewer tasks), unless a narrower one evens out their sum.
    """
    alone = tuple(_alone(n, batch, workers, unit, most) for n in columns)
    least, best = busiest(columns, alone, batch, workers), alone
    for c in range(max(alone) - unit, 0, -unit) if len(columns) > 1 else ():
        narrow = tuple(min(c, a) for a in alone)
        load = busiest(columns, narrow, batch, workers)
        if load < least:
            least, best = load, narrow
    return best


def busiest(columns: tuple[int, ...], width: tuple[int, ...], batch: int, workers: int) -> int:
    """Columns, counted for every batch, of the worker that gets the most when tasks go to the least busy one."""
    sizes = [c for n, c in zip(columns, width, strict=True) for _ in range(math.ceil(n / c) * batch)]
    load = [0] * workers
    for x in sorted(sizes, reverse=True):
        heapq.heapreplace(load, load[0] + x)
    return max(load)


def _alone(n: int, batch: int, workers: int, unit: int, most: int) -> int:
    candidates = range(unit, min(most, math.ceil(n / unit) * unit) + 1, unit)
    return min(candidates, key=lambda c: (math.ceil(math.ceil(n / c) * batch / workers) * c, -c))
