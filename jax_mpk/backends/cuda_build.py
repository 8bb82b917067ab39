"""From a program to an executable for one CUDA device: source, machine code, plan. Needs no GPU."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_mpk import abi
from jax_mpk.backends import cuda_plan, cuda_source, nvrtc
from jax_mpk.options import WINDOW

OLDEST = 80
"""The first compute capability that has what every kernel uses (bf16 `mma`)."""


def generation(arch: str) -> int:
    """The compute capability of "sm_90a", as 90."""
    return int("".join(c for c in arch if c.isdigit()))


@dataclass(frozen=True)
class Device:
    """What code is generated for: the architecture whose features it uses, the multiprocessors, whether tensor copies may
    be used, how many of them are in flight at once, the frames of the ring (0: what fits), whether tasks leave times,
    and the architecture of the machine code ("": the same), which may be newer than the features."""

    arch: str = "sm_90a"
    workers: int = 132
    stream: bool = True
    window: int = WINDOW
    ring: int = 0
    profile: bool = False
    machine: str = ""


@dataclass(frozen=True)
class Executable:
    """A program ready to launch: the planned blob, the machine code, and the numbers that the launcher needs."""

    plan: cuda_plan.Plan
    source: cuda_source.Source
    cubin: nvrtc.Cubin
    device: Device

    def attributes(self, deadline_ms: int = 60_000) -> dict[str, Any]:
        return {"cubin": np.frombuffer(self.cubin.code, np.uint8), "smem": np.int64(self.source.smem),
                "spill": np.int64(self.plan.spill), "tickets": np.int64(self.plan.tickets),
                "deadline_ms": np.int64(deadline_ms)}  # fmt: skip


def build(blob: bytes, on: Device, cache: Path | None = None) -> Executable:
    """Source, machine code and plan of a program; raises `nvrtc.CompileError` (a bug of this package)."""
    program = abi.decode(blob)
    source = cuda_source.generate(program, on.arch, stream=on.stream, window=on.window, ring=on.ring,
                                 profile=on.profile)  # fmt: skip
    cubin = nvrtc.compile(source.text, on.machine or on.arch, cache=cache)
    key = hashlib.sha256(cubin.code).digest()
    return Executable(cuda_plan.plan(program, source, on.workers, on.profile, key), source, cubin, on)
