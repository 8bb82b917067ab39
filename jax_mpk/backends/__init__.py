"""Backends: a package a platform, named like XLA's platform, whose module `backend` has the interface below.

    device(options) -> Device                            the device that programs are compiled for
    ready() -> None                                      registers the FFI handlers; `UnsupportedError` if it cannot
    lower(ctx, operands, jaxpr, options, name) -> list   the lowering rule: compiles, emits one custom call
    times(program, device, results, operands, options)   of one launch after a few: [task records, 4] in ns, and workers

`ffi_call` is the custom call that every backend emits.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_mpk import abi
from jax_mpk.device import Device
from jax_mpk.errors import UnsupportedError
from jax_mpk.options import Options

NAMES = ("cpu", "cuda")
LAUNCHES = 8
"""Of those that leave times the last one counts."""


def get(name: str) -> ModuleType:
    """The module of a backend; raises `UnsupportedError` when this build has none for the platform."""
    if name not in NAMES:
        raise UnsupportedError("megakernel", f"there is no backend for {name!r}; there are {', '.join(NAMES)}")
    try:
        return importlib.import_module(f"jax_mpk.backends.{name}.backend")
    except ModuleNotFoundError as e:
        if e.name != f"jax_mpk.backends.{name}":
            raise
        raise UnsupportedError("megakernel", f"the {name!r} backend is not part of this build") from None


def adjusted(target: Device, options: Options) -> Device:
    """The target with the overrides of the options (0 keeps the target's own value)."""
    knobs = {k: getattr(options, k) for k in ("workers", "tasks", "columns") if getattr(options, k)}
    return replace(target, **knobs)


def aliases(program: abi.Program) -> dict[int, int]:
    """Operand -> the result that lives in its buffer."""
    b = program["Buffer"]
    return {
        int(x["alias"]): int(x["index"]) for x in b[(b["space"] == abi.enum("Space", "RESULT")) & (b["alias"] >= 0)]
    }


def ffi_call(
    ctx: Any, operands: Sequence[Any], target_name: str, blob: bytes, attributes: Mapping[str, Any]
) -> list[Any]:
    """Emits the custom call of a program and returns its results (the workspace left off).

    Operands and results are the program's, in order; the workspace is a last result of type u8, also where it has no bytes:
    a call whose results are exactly what a loop carries becomes the root of the loop's body, and XLA then takes its operands
    for what the loop leaves unchanged (`GetInvariantGTEsForWhileBody`, seen in jax 0.10 and 0.11 on CPUs). A
    result that lives in an operand's buffer is aliased with it, so XLA copies only what somebody else still needs.
    The program travels as an attribute; executors find each other by the hash in it.
    """
    program = abi.decode(blob)
    workspace = int(program.header["workspace"])
    avals = [*ctx.avals_out, jax.core.ShapedArray((workspace,), np.dtype(np.uint8))]
    rule = jax.ffi.ffi_lowering(target_name, operand_output_aliases=aliases(program))
    values = rule(ctx.replace(avals_out=avals), *operands, program=np.frombuffer(blob, np.uint8), **attributes)
    return list(values)[: len(ctx.avals_out)]
