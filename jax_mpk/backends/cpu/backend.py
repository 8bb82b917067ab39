"""The CPU backend: the prebuilt executor of the extension module behind the XLA custom call `jax_mpk_cpu`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_mpk import abi, backends, compiler
from jax_mpk.backends import LAUNCHES
from jax_mpk.device import Device, cpu
from jax_mpk.errors import UnsupportedError
from jax_mpk.options import Options

TARGET_NAME = "jax_mpk_cpu"


def device(options: Options) -> Device:
    """This machine as the compiler sees it, or one with `options.workers` processors."""
    return backends.adjusted(cpu(options.workers or os.cpu_count() or 2), options)


@functools.cache
def ready() -> None:
    """Registers the handler once; raises `UnsupportedError` when the extension module cannot be loaded."""
    try:
        from jax_mpk import _ext
    except ImportError as e:
        raise UnsupportedError("megakernel", f"the extension module jax_mpk._ext does not load ({e})") from e
    for name, capsule in _ext.registrations().items():
        if name == TARGET_NAME:
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def times(
    p: abi.Program, on: Device, results: Sequence[Any], operands: Sequence[Any], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """When every task of a launch began and ended (the stages between are not told apart), and who ran it."""
    from jax_mpk import _ext

    def raw(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1).view(np.uint8) if x.size else np.zeros(0, np.uint8)

    alias = {result: operand for operand, result in backends.aliases(p).items()}
    held = [np.asarray(x) for x in operands]
    found = np.zeros((len(p["Task"]), 3), np.uint64)
    for _ in range(LAUNCHES):
        args = [raw(np.array(x)) for x in held]
        out = [args[alias[n]] if n in alias else raw(np.empty(r.shape, r.dtype)) for n, r in enumerate(results)]
        _ext.run(p.blob, args, out, threads=options.threads, deadline_ms=options.deadline_ms, times=found)
    at = found[:, [0, 0, 1, 1]].astype(np.int64)
    return at, found[:, 2].astype(np.int64)


def lower(ctx: Any, operands: Sequence[Any], jaxpr: Any, options: Options, name: str) -> list[Any]:
    """The lowering rule of the primitive on CPUs: one custom call."""
    ready()
    blob = compiler.program(jaxpr, device(options), options, name=name)
    attributes = {"deadline_ms": np.int64(options.deadline_ms)}
    attributes |= {k: np.int64(v) for k, v in (("threads", options.threads), ("seed", options.seed)) if v}
    return backends.ffi_call(ctx, operands, TARGET_NAME, blob, attributes)
