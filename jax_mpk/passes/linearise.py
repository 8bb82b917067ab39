"""Linearisation: the order of the task records.

Breadth first by level, so it is a topological order of the events. Inside a level, the tasks that wait for the same
event are contiguous, then follow program order: operators that can run together do so in the order of the program.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.passes.hops import levels


def run(tg: TaskGraph) -> TaskGraph:
    """`tg` with `order`."""
    assert tg.waits is not None
    event = np.full(tg.tasks, -1, np.int64)
    waiting = np.diff(tg.waits.start) > 0
    event[waiting] = tg.waits.data[tg.waits.start[1:][waiting] - 1]  # the latest event of the task
    return replace(tg, order=np.lexsort((np.arange(tg.tasks), event, levels(tg))).astype(np.int32))
