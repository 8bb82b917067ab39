"""From a program to an executable for one CUDA device: machine code. Needs no GPU."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cuda import nvrtc
from jax_mpk.device import Device


@dataclass(frozen=True)
class Executable:
    """A program ready to launch: the blob, whose key is now the hash of the machine code, and the machine code."""

    blob: bytes
    cubin: nvrtc.Cubin

    def attributes(self, deadline_ms: int = 60_000) -> dict[str, Any]:
        return {"cubin": np.frombuffer(self.cubin.code, np.uint8), "deadline_ms": np.int64(deadline_ms)}


def text(program: abi.Program) -> str:
    """The source of a program."""
    return program["Source"]["byte"].tobytes().decode()


def build(blob: bytes, device: Device, cache: Path | None = None) -> Executable:
    """Compiles the text of a program; raises `nvrtc.CompileError` (a bug of this package)."""
    cubin = nvrtc.compile(text(abi.decode(blob)), device.machine, cache=cache)
    return Executable(abi.with_key(blob, hashlib.sha256(cubin.code).digest()), cubin)
