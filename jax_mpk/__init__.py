"""jax_mpk: a JAX function as one persistent kernel."""

from __future__ import annotations

import contextlib as _contextlib

import jax.export as _export

from jax_mpk import backends as _backends
from jax_mpk.api import Megakernelized, megakernelize
from jax_mpk.errors import (
    ExecutionError,
    MegakernelWarning,
    MpkError,
    OptionError,
    StateError,
    UnsupportedError,
    VerifyError,
)
from jax_mpk.options import Options, override

__version__ = "0.1.0"

DISABLE_EXPORT_CHECKS = tuple(
    _export.DisabledSafetyCheck.custom_call(f"jax_mpk_{platform}") for platform in ("cpu", "cuda")
)
"""For `jax.export.export(..., disabled_checks=DISABLE_EXPORT_CHECKS)`: megakernels are custom calls."""

__all__ = [
    "DISABLE_EXPORT_CHECKS", "ExecutionError", "MegakernelWarning", "Megakernelized", "MpkError", "OptionError", "Options",
    "StateError", "UnsupportedError", "VerifyError", "megakernelize", "override",
]  # fmt: skip

for _name in _backends.NAMES:  # now, because exported functions run without any of our lowering rules
    with _contextlib.suppress(UnsupportedError):
        _backends.get(_name).ready()
