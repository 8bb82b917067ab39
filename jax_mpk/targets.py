"""What the compiler must know about a device. Results never depend on it, except through the numerics of split-K."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A device as decomposition and placement see it.

    name: "cpu" or "cuda". workers: default number of co-resident workers (threads; SMs). columns: preferred columns
    of a contraction task (a multiple). tasks: preferred tasks an operator, so that workers are busy (derived from the
    device, never from the threads of a run: a program gives the same bits with any number of them). frame: bytes of a stream frame,
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


def cpu(processors: int) -> Target:
    """A machine with that many processors: two to four tasks a worker, so that an uneven cut does not idle one.

    More than 32 workers only wait for each other: a few cores saturate the memory, and an operator takes microseconds.
    """
    workers = min(max(processors, 2), 32)
    return Target("cpu", workers=workers, columns=64, tasks=1 << (2 * workers - 1).bit_length(), rows=True)


CPU = cpu(2)
SM90 = Target("cuda", workers=132, columns=64, tasks=132, ring=12)
