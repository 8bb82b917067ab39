"""What a device can do: the one description that passes and back ends ask. Results never depend on it, except through
the numerics of split-K. Features are asked for by name (`gpu`, `tensor_copies`), never inferred from a number."""

from __future__ import annotations

from dataclasses import dataclass

from jax_mpk.abi.launch import FRAME, INNER

COLUMNS = 64
"""Columns of a contraction task: what a warp group multiplies at once, and whole cache lines."""
SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448}
"""Bytes of shared memory that a block can have, by compute capability (CUDA programming guide)."""
OLDEST = 80
"""The first compute capability that has what every kernel uses (bf16 `mma`)."""
WINDOW = 3
"""Copies of the weight stream in flight, unless a knob says otherwise: what was fastest on an H100."""


@dataclass(frozen=True)
class Device:
    """A device as passes and back ends see it.

    name: "cpu" or "cuda". workers: co-resident workers (threads; SMs). tasks: preferred tasks an operator, so that
    workers are busy (derived from the device, never from the threads of a run: a program gives the same bits with any
    number of them). columns: preferred columns of a contraction task (a multiple). rows: cut large `[K, N]` weights by
    rows, which are contiguous, rather than by columns (see the pass `split`).

    GPUs: arch: the architecture whose features the code uses ("sm_90a"); machine: that of the machine code, which may
    be newer. shared: bytes of shared memory of a worker. tensor_copies: weights may be streamed by the tensor copy
    engine. window: frames in flight; ring: frames a worker holds (0: what fits). frame, inner: bytes of a frame and of
    its contiguous run. profile: tasks leave times.
    """

    name: str
    workers: int
    columns: int
    tasks: int
    rows: bool = False
    arch: str = ""
    machine: str = ""
    shared: int = 0
    tensor_copies: bool = False
    window: int = WINDOW
    ring: int = 0
    frame: int = FRAME
    inner: int = INNER
    profile: bool = False

    @property
    def gpu(self) -> bool:
        """Workers are blocks of a kernel: cooperating threads, shared memory, tensor cores."""
        return self.name == "cuda"


def cpu(processors: int) -> Device:
    """A machine with that many processors: two to four tasks a worker, so that an uneven cut does not idle one.

    More than 32 workers only wait for each other: a few cores saturate the memory, and an operator takes microseconds.
    """
    workers = min(max(processors, 2), 32)
    return Device("cpu", workers, COLUMNS, 1 << (2 * workers - 1).bit_length(), rows=True)


def generation(arch: str) -> int:
    """The compute capability of "sm_90a", as 90."""
    return int("".join(c for c in arch if c.isdigit()))


def cuda(arch: str = "sm_90a", workers: int = 132, *, machine: str = "", stream: bool = True, window: int = WINDOW,
         ring: int = 0) -> Device:  # fmt: skip
    """A GPU of that architecture with so many multiprocessors; `stream` False leaves the tensor copy engine alone."""
    capability = generation(arch)
    known = [c for c in SHARED if c <= max(capability, OLDEST)]
    return Device("cuda", workers, COLUMNS, workers, arch=arch, machine=machine or arch, shared=SHARED[max(known)],
                  tensor_copies=stream and capability >= 90, window=window, ring=ring)  # fmt: skip


CPU = cpu(2)
H100 = cuda()
