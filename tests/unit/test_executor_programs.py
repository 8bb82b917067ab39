"""Every program of `test_emit` on the C++ executor: legal orders by seed, poisoned memory, two threads."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_mpk import _ext, abi
from jax_mpk.backends.cpu.operators import pressure
from jax_mpk.ir import interpret
from jax_mpk.passes import refine
from tests.unit.test_emit import CASES, close, finish, graphs, small_tasks  # noqa: F401  (the fixture cuts operators small)


def _bytes(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_function(name: str) -> None:
    f, args = CASES[name]
    flat = [np.array(x, order="C") for x in jax.tree.leaves(args)]
    for g in graphs(f, *args):
        want = interpret.run(g, flat)
        blob = finish(refine.run(g, pressure))
        alias = {int(b["index"]): int(b["alias"]) for b in abi.decode(blob)["Buffer"] if b["alias"] >= 0}
        for seed in (-1, 3):
            have = [flat[alias[n]].copy() if n in alias else np.empty(x.shape, x.dtype) for n, x in enumerate(want)]
            _ext.run(blob, [_bytes(x) for x in flat], [_bytes(x) for x in have], threads=2, seed=seed, poison=True,
                     deadline_ms=20_000)  # fmt: skip
            for x, y in zip(have, want, strict=True):
                close(x, y)
