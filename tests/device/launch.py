"""Runs a program blob on the GPU through its custom call: damaged ones, and with other attributes than the backend's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jax_mpk
from jax_mpk import Options, abi
from jax_mpk.backends.cuda import backend as cuda
from jax_mpk.backends.cuda.build import build


def program(f: Any, *args: Any, **knobs: Any) -> bytes:
    """The blob of a function of arrays."""
    options = Options(cache_dir="", **knobs)
    lowered = jax_mpk.megakernelize(f, implementation="cuda", options=options).lower(*args)
    return lowered.program


def function(blob: bytes, results: Any, deadline_ms: int = 5000) -> Any:
    """A function of the program's operands that returns its results, of the shapes `results`."""
    cuda.ready()
    e = build(blob, cuda.device(Options()))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(results)]
    shapes.append(jax.ShapeDtypeStruct((int(abi.decode(blob).header["workspace"]),), np.uint8))
    call = jax.ffi.ffi_call(cuda.TARGET_NAME, shapes)
    attributes = {"program": np.frombuffer(e.blob, np.uint8), **e.attributes(deadline_ms)}
    return lambda *args: call(*args, **attributes)[:-1]


def without_event(blob: bytes, event: int) -> bytes:
    """The program with every trigger of one event removed, after whoever verified it."""
    p = abi.decode(blob)
    sections = {name: p[name].copy() for name in abi.SECTIONS}
    for t in sections["Task"]:
        kept = [int(e) for e in t["trigger"][: int(t["n_triggers"])] if int(e) != event]
        t["n_triggers"], t["trigger"] = len(kept), 0
        t["trigger"][: len(kept)] = kept
    return abi.encode(sections, **p.settings)
