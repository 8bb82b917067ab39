"""What the controller of a block brings to the L2 cache before a task may start.

Weights of a norm, a table, the cache of an attention: nothing in this step has touched them, so they lie in device memory,
a long read behind the moment for which everybody waits. A prefetch neither reads nor orders anything, so it is right at any
time, whoever writes those bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jax_mpk import abi

SMALL = 16384
"""Bytes of an operand up to which a block brings all of it."""


def small(p: abi.Program) -> np.ndarray:
    """For every slot the bytes to bring: from its place to the end of a small operand or constant, else 0."""
    b, s = p["Buffer"], p["Slot"]
    outside = np.isin(b["space"], [abi.enum("Space", x) for x in ("ARG", "CONST")])
    size = np.where(outside & (b["bytes"] <= SMALL), b["bytes"], 0).astype(np.int64)
    return np.maximum(size[s["buffer"]] - s["offset"], 0)


def constant(p: abi.Program, op: np.void, slots: Iterable[int]) -> bool:
    """Whether no task writes these slots of `op`, so that a controller may read them before the task's events."""
    b = p["Buffer"]
    kept = set(b["alias"][b["space"] == abi.enum("Space", "RESULT")].tolist())
    for s in slots:
        if s >= abi.SLOT_ACT:
            return False
        x = b[int(p["Slot"][int(op["slot"]) + s]["buffer"])]
        space = abi.ENUMS["Space"][int(x["space"])]
        if space != "CONST" and (space != "ARG" or int(x["index"]) in kept):
            return False
    return True
