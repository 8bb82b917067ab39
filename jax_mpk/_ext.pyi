"""The extension module: XLA FFI handlers, and entries for tests and benchmarks."""

from collections.abc import Sequence
from typing import Any

class ProgramError(ValueError):
    """A blob that is not a program of this version, or that is damaged."""

def run(
    blob: bytes,
    args: Sequence[Any],
    results: Sequence[Any],
    *,
    threads: int = 0,
    seed: int = -1,
    poison: bool = False,
    deadline_ms: int = 60000,
    isa: str = "",
    times: Any = None,
) -> None:
    """Runs a program on contiguous buffers (their byte sizes count, not their types); results are written in place.

    threads: 0 = one per core. seed >= 0: one thread, a random order that the events allow. poison: fills the workspace
    and the results that are no alias with 0xff bytes first. times: u64 [tasks][3], gets when every task began and ended (ns
    of the steady clock) and its worker. Raises `ProgramError`, `ValueError` for buffers that do not
    fit, `TimeoutError` when no task finished for `deadline_ms`, and `MemoryError`.
    """

def check(blob: bytes) -> None:
    """Loads a program and drops it; raises `ProgramError`."""

def info() -> dict[str, Any]:
    """isa (chosen), isas (usable here), threads, abi_version, ffi_version (of the headers), cuda (built in)."""

def read_bandwidth(bytes: int, threads: int = 0, rounds: int = 5) -> float:
    """Bytes per second of the best pass of a read-only stream over fresh memory."""

def registrations() -> dict[str, Any]:
    """XLA FFI targets of the CPU by name, for `jax.ffi.register_ffi_target`."""

def programs_kept() -> int:
    """How many loaded programs the table of this process keeps; it is bounded."""

def cuda_handlers() -> dict[str, Any]: ...
def cuda_state_type() -> dict[str, Any]: ...
def cuda_code(program: bytes, cubin: bytes) -> tuple[int, Any]:
    """What a call site holds, and its identity: equal sites share it. `ValueError` for damage and other machine code."""

def cuda_check() -> str: ...
def cuda_streams() -> int: ...
def cuda_read_bandwidth(cubin: bytes, bytes: int, passes: int = 5, device: int = 0) -> float: ...
