"""Interleaved timing: contestants take turns, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Run = Callable[[], Any]
"""One timed piece of work; returns when it is done."""


SETTLE = 0.1
"""Seconds until a contestant's threads sleep: XLA's CPU pools spin for 20 to 60 ms after their last piece of work, on
processors that the next contestant would need (seen as context switches; steps of 12 ms took 30)."""


def interleave(
    runs: Mapping[str, Run], repeats: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every run, ``repeats`` times each, after one untimed warm-up of each.

    The order rotates from repeat to repeat, so that no contestant always follows the same other. Every turn starts
    after a pause of ``SETTLE`` seconds.
    """
    for run in runs.values():
        run()
        tick()
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE)
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
            tick()
    return seconds


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, range and quartiles of samples, and the samples."""
    ordered = sorted(samples)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "samples": list(samples),
    }


def ratios(baseline: Sequence[float], candidate: Sequence[float]) -> dict[str, Any]:
    """How many times faster the candidate was, repeat by repeat."""
    return summary([b / c for b, c in zip(baseline, candidate, strict=True)])
