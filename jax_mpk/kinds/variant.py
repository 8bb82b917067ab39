"""How a GPU runs the tasks of an operator: what a kind decides before anything is proven, and printed from."""

from __future__ import annotations

from dataclasses import dataclass

ROOM = 66 << 10
"""Most bytes of activations, and of accumulators, in shared memory; beyond it they go to the workspace."""


@dataclass(frozen=True)
class Variant:
    """streamed: the loader brings the weights, frame by frame. parts: workers that share a task; the last one to finish
    ends it. act, acc: bytes of shared memory for what is multiplied and for sums. spill: bytes of a worker's own scratch
    in the workspace, for what does not fit. partial: bytes that the parts of one task leave for the one that ends it."""

    streamed: bool = False
    parts: int = 1
    act: int = 0
    acc: int = 0
    spill: int = 0
    partial: int = 0
