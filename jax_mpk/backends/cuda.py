"""The CUDA backend: one generated kernel a program, compiled by NVRTC, behind the XLA custom call `jax_mpk_cuda`.

Everything that a launch needs travels in attributes (the planned program and the CUBIN), so an executable from the
persistent cache or from `jax.export` runs in any process. Nothing here needs a GPU: without one the code is for the
architecture that `device` names.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax

from jax_mpk import backends, compiler, targets
from jax_mpk.backends.cuda_build import Device, Executable, build
from jax_mpk.errors import ExecutionError, UnsupportedError
from jax_mpk.options import Options
from jax_mpk.targets import Target

TARGET_NAME = "jax_mpk_cuda"
STATE_NAME = "jax_mpk_cuda_state"


def device() -> Device:
    """The first CUDA device of this process, or what JAX_MPK_CUDA_ARCH and the defaults say when there is none."""
    stream = os.environ.get("JAX_MPK_CUDA_STREAM", "1") != "0"
    arch = os.environ.get("JAX_MPK_CUDA_ARCH", "")
    try:
        d = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return Device(arch or "sm_90a", 132, stream)
    if not arch:
        arch = "sm_" + str(d.compute_capability).replace(".", "")
        arch += "a" if arch in ("sm_90", "sm_100") else ""
    return Device(arch, int(d.core_count), stream)


def target(options: Options) -> Target:
    """The device as the compiler sees it, with the overrides of `options`."""
    d = device()
    base = targets.SM90
    return backends.adjusted(Target("cuda", workers=d.workers, columns=base.columns, tasks=d.workers, frame=base.frame,
                                    inner=base.inner, ring=base.ring if d.stream else 0), options)  # fmt: skip


@functools.cache
def ready() -> None:
    """Registers the handlers once; raises `UnsupportedError` when the extension module cannot be loaded."""
    try:
        from jax_mpk import _ext  # type: ignore[attr-defined]
    except ImportError as e:
        raise UnsupportedError("megakernel", f"the extension module jax_mpk._ext does not load ({e})") from e
    if not hasattr(_ext, "cuda_handlers"):
        raise UnsupportedError("megakernel", "this build of jax_mpk._ext has no CUDA launcher")
    jax.ffi.register_ffi_type(STATE_NAME, _ext.cuda_state_type(), platform="CUDA")
    jax.ffi.register_ffi_target(TARGET_NAME, _ext.cuda_handlers(), platform="CUDA")


@functools.lru_cache(maxsize=64)
def _build(blob: bytes, on: Device, options: Options) -> Executable:
    cache = options.cache_path()
    return build(blob, on, cache and cache / "cubin")


def lower(ctx: Any, operands: Sequence[Any], jaxpr: Any, options: Options, name: str) -> list[Any]:
    """The lowering rule of the primitive on CUDA devices: one custom call."""
    ready()
    blob = compiler.program(jaxpr, target(options), options, name=name)
    e = _build(blob, device(), options)
    return backends.ffi_call(ctx, operands, TARGET_NAME, e.plan.blob, e.attributes(options.deadline_ms))


def check() -> None:
    """Raises `ExecutionError` for a launch that gave up. Reads host memory only: block on the results first."""
    from jax_mpk import _ext  # type: ignore[attr-defined]

    message = _ext.cuda_check()
    if message:
        raise ExecutionError(message)
