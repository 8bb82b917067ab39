"""What the compiler must know about a device. Results never depend on it, except through the numerics of split-K."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A device as decomposition and placement see it.

    name: "cpu" or "cuda". workers: default number of co-resident workers (threads; SMs). columns: preferred columns
    of a contraction task (a multiple). tasks: preferred tasks an operator, so that workers are busy (never derived
    from the number of threads: the same program must give the same bits anywhere). frame: bytes of a stream frame,
    inner: bytes of its contiguous run; ring: frames a worker can hold (0: the target does not stream).
    rows: cut large `[K, N]` weights by rows, which are contiguous, rather than by columns (see the pass `split`).
    """

    name: str
    workers: int
    columns: int
    tasks: int
    frame: int = 16384
    inner: int = 128
    ring: int = 0
    rows: bool = False


CPU = Target("cpu", workers=2, columns=64, tasks=4, rows=True)
SM90 = Target("cuda", workers=132, columns=64, tasks=132, ring=12)
