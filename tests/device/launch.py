"""Runs a program blob on the GPU through its custom call, without the compiler."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jax_mpk import abi
from jax_mpk.backends import cuda, cuda_build
from jax_mpk.options import Options

TARGET, STATE = "jax_mpk_cuda_test", "jax_mpk_cuda_state"


@functools.cache
def extension() -> Any:
    """The extension module: the installed one, or the file that JAX_MPK_EXT names."""
    path = os.environ.get("JAX_MPK_EXT")
    if not path:
        from jax_mpk import _ext

        return _ext
    spec = importlib.util.spec_from_file_location("_ext", path)
    assert spec and spec.loader
    module = sys.modules.setdefault("_ext", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@functools.cache
def register() -> None:
    jax.ffi.register_ffi_type(STATE, extension().cuda_state_type(), platform="CUDA")
    jax.ffi.register_ffi_target(TARGET, extension().cuda_handlers(), platform="CUDA")


def device(**overrides: Any) -> cuda_build.Device:
    return replace(cuda.device(Options()), **overrides)


def function(blob: bytes, results: Sequence[tuple[tuple[int, ...], Any]], on: cuda_build.Device, deadline_ms: int = 5000,
             aliases: dict[int, int] | None = None) -> Any:  # fmt: skip
    """A function of the program's operands that returns its results."""
    register()
    e = cuda_build.build(blob, on)
    program = abi.decode(e.plan.blob)
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in results]
    shapes.append(jax.ShapeDtypeStruct((int(program.header["workspace"]),), np.uint8))
    call = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases=aliases or {})
    attributes = {"program": np.frombuffer(e.plan.blob, np.uint8), **e.attributes(deadline_ms)}

    def run(*args: Any) -> Any:
        return call(*args, **attributes)[:-1]

    return run
