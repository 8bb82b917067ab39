"""A model function as one megakernel, against the same function in ``jax.jit`` and what a reference says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jax_mpk

ROUGHLY = 0.02  # of what models of bfloat16 compute


def assert_numeric_gate(f: Callable, exact: Any, *args: Any, within: float = 2e-5) -> list[np.ndarray]:
    """``f`` is a single megakernel, whose error is at most 1.25 times that of ``jax.jit``.

    XLA is told to round where ``f`` does, as we do and as ``f`` outside of ``jax.jit`` does. By itself it leaves out roundings to
    bfloat16, and is nearer to ``exact`` by up to a third.

    Args:
      exact: what ``f(*args)`` would be in exact arithmetic: arrays of floats, in the structure of its result.
      within: what the error may be at most, in units of the size of what is exact; ``ROUGHLY`` for bfloat16.

    Returns:
      The leaves of the megakernel's result.
    """
    megakernel = jax_mpk.megakernelize(f, implementation="cpu")  # a named implementation does all of it or raises
    said = megakernel.explain(*args)
    assert said.count(" for cpu: ") == 1 and "XLA" not in said, said
    xla = jax.tree.leaves(jax.jit(f, compiler_options={"xla_allow_excess_precision": False})(*args))
    ours = jax.tree.leaves(jax.jit(megakernel)(*args))
    for want, theirs, found in zip(jax.tree.leaves(exact), xla, ours, strict=True):
        assert found.dtype == theirs.dtype and found.shape == theirs.shape == want.shape
        errors = [np.sqrt(np.mean((np.asarray(x, np.float64) - want) ** 2)) for x in (theirs, found)]
        scale = np.sqrt(np.mean(want**2))
        assert scale > 0 and errors[0] <= within * scale, (errors, scale)
        assert errors[1] <= 1.25 * errors[0] + 2e-6 * scale, (errors, scale)
    return [np.asarray(x) for x in ours]
