"""The CPU backend: the prebuilt executor of the extension module behind the XLA custom call `jax_mpk_cpu`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_mpk import backends, compiler
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


def lower(ctx: Any, operands: Sequence[Any], jaxpr: Any, options: Options, name: str) -> list[Any]:
    """The lowering rule of the primitive on CPUs: one custom call."""
    ready()
    blob = compiler.program(jaxpr, device(options), options, name=name)
    attributes = {"deadline_ms": np.int64(options.deadline_ms)}
    attributes |= {k: np.int64(v) for k, v in (("threads", options.threads), ("seed", options.seed)) if v}
    return backends.ffi_call(ctx, operands, TARGET_NAME, blob, attributes)
