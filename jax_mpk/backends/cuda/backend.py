"""The CUDA backend: one generated kernel a program, compiled by NVRTC, behind the XLA custom call `jax_mpk_cuda`.

Everything that a launch needs travels in attributes (the planned program and the CUBIN), so an executable from the
persistent cache or from `jax.export` runs in any process. Nothing here needs a GPU: without one the code is for the
architecture that `device` names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_mpk import abi, backends, compiler
from jax_mpk.backends import LAUNCHES
from jax_mpk.backends.cuda import nvrtc, source
from jax_mpk.backends.cuda.build import Executable, build
from jax_mpk.device import OLDEST, Device, cuda, generation
from jax_mpk.errors import ExecutionError, UnsupportedError
from jax_mpk.options import Options, current

TARGET_NAME = "jax_mpk_cuda"
STATE_NAME = "jax_mpk_cuda_state"


def device(options: Options | None = None) -> Device:
    """The first CUDA device of this process with the knobs of `options` (None: those in force); without a device, an
    H100, or an example of `options.arch`. Raises `UnsupportedError` for an architecture that is too old or not there."""
    o = current(options)
    try:
        d = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        machine, workers = o.arch or "sm_90a", 132
    else:
        machine, workers = "sm_" + str(d.compute_capability).replace(".", ""), int(d.core_count)
        machine += "a" if machine in ("sm_90", "sm_100") else ""
    arch = o.arch or machine
    for name in (arch, machine):
        if generation(name) < OLDEST:
            raise UnsupportedError("megakernel", f"the CUDA backend needs compute capability 8.0 or later, not {name}")
    if generation(arch) > generation(machine):
        raise UnsupportedError("megakernel", f"the option arch={arch} is newer than this device, {machine}")
    found = cuda(arch, workers, machine=machine, stream=o.stream, window=o.window, ring=o.ring)
    return backends.adjusted(found, o)


@functools.cache
def ready() -> None:
    """Registers the handlers once; raises `UnsupportedError` when the extension module cannot be loaded."""
    try:
        from jax_mpk import _ext
    except ImportError as e:
        raise UnsupportedError("megakernel", f"the extension module jax_mpk._ext does not load ({e})") from e
    if not hasattr(_ext, "cuda_handlers"):
        raise UnsupportedError("megakernel", "this build of jax_mpk._ext has no CUDA launcher")
    state = _ext.cuda_state_type()
    jax.ffi.register_ffi_type(
        STATE_NAME, {"type_id": state["type_id"], "type_info": state["type_info"]}, platform="CUDA"
    )
    jax.ffi.register_ffi_target(TARGET_NAME, _ext.cuda_handlers(), platform="CUDA")


@functools.lru_cache(maxsize=64)
def _build(blob: bytes, on: Device, options: Options) -> Executable:
    cache = options.cache_path()
    return build(blob, on, cache and cache / "cubin")


def lower(ctx: Any, operands: Sequence[Any], jaxpr: Any, options: Options, name: str) -> list[Any]:
    """The lowering rule of the primitive on CUDA devices: one custom call."""
    ready()
    on = device(options)
    e = _build(compiler.program(jaxpr, on, options, name=name), on, options)
    return backends.ffi_call(ctx, operands, TARGET_NAME, e.blob, e.attributes(options.deadline_ms))


def times(
    p: abi.Program, on: Device, results: Sequence[Any], operands: Sequence[Any], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """When every task of a launch began, had its activation and its sums, and ended, and the block that ran it. The program is
    one that leaves times, behind everything else in its workspace."""
    ready()
    e = _build(p.blob, on, options)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
    shapes.append(jax.ShapeDtypeStruct((int(p.header["workspace"]),), np.dtype(np.uint8)))
    kept = backends.aliases(p)
    call = jax.ffi.ffi_call(TARGET_NAME, shapes, input_output_aliases=kept)
    attributes = {"program": np.frombuffer(e.blob, np.uint8), **e.attributes(options.deadline_ms)}
    run = jax.jit(lambda *args: call(*args, **attributes)[-1])
    for _ in range(LAUNCHES):
        last = jax.block_until_ready(run(*operands))
    check()
    k, n = p["Kernel"][0], len(p["Task"])
    begin = int(k["spill_at"]) + int(k["spill"]) * int(p.header["workers"])
    at = np.asarray(last)[begin : begin + 32 * n].view(np.int64).reshape(n, 4)
    return at, p["Task"]["worker"].astype(np.int64)


def read_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes per second at which the first device reads `nbytes` of its memory and does nothing else: the fastest of a few
    passes. Raises `RuntimeError` without a GPU, and where the memory has no room for so many bytes."""
    from jax_mpk import _ext

    on = device(Options())
    code = nvrtc.compile((source.root() / "read.cu").read_text(), on.machine).code
    return float(_ext.cuda_read_bandwidth(code, nbytes))


def check() -> None:
    """Raises `ExecutionError` for a launch that gave up. Reads host memory only: block on the results first."""
    from jax_mpk import _ext

    message = _ext.cuda_check()
    if message:
        raise ExecutionError(message)
