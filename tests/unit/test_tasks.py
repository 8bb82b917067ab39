"""Every task kind on the cases of its registry entry: equal to XLA, and the same bits on any threads in any order."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_mpk.kinds import KINDS, kind_of
from tests.execute import Runner

CASES = [(kind, case) for kind in KINDS for case in kind.cases]


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{k.name}-{c.name}" for k, c in CASES])
def test_case(kind, case):
    args = case.make(np.random.default_rng(sum(map(ord, case.name))))
    runner = Runner(case.fn, *args)
    assert any(kind_of(op) is kind for op in runner.compiled.stages["refine"].ops), "the case does not reach its kind"
    want = jax.tree.leaves(jax.jit(case.fn)(*args))
    got = runner(threads=2)
    for a, b in zip(got, want, strict=True):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        elif a.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b)
        else:  # bf16: sums in another order may round to the neighbour
            np.testing.assert_allclose(a.astype(np.float32), np.asarray(b, np.float32), rtol=2**-7, atol=2**-7)
    for how in [dict(threads=1), dict(threads=3), dict(threads=8), *(dict(seed=s) for s in range(12))]:
        for a, b in zip(runner(**how), got, strict=True):
            np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8), err_msg=str(how))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_every_kind_has_cases_and_costs(kind):
    assert kind.cases
    args = kind.cases[0].make(np.random.default_rng(0))
    ops = [op for op in Runner(kind.cases[0].fn, *args).compiled.stages["refine"].ops if kind_of(op) is kind]
    flops, scalar = kind.work(ops[0])
    assert scalar > 0 and (flops > 0) == (kind.name in ("contract", "attention"))
