"""What every pass makes of small graphs, as text (`tests.golden` says how to add one and how to update them)."""

import numpy as np
import pytest

from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Graph, compute_dtype
from jax_mpk.ir.parse import parse
from tests import golden


@pytest.mark.parametrize("case", golden.CASES)
def test_golden(case):
    assert golden.run(case) == golden.read(case)[1], f"python -m tests.golden --update {case}"


@pytest.mark.parametrize("case", [c for c in golden.CASES if not c.startswith("emit/")])
def test_what_is_expected_computes_the_same(case):
    """A wrong graph does not become right by being written down."""
    before, after = golden.graph(case), parse(golden.read(case)[1])
    args = _operands(before)
    for x, y in zip(interpret.run(before, args), interpret.run(after, args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def _operands(g: Graph) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    values = [g.values[i] for i in g.args]
    numbers = [
        rng.normal(size=v.shape) if compute_dtype(v.dtype) == "f32" else rng.integers(0, 5, v.shape) for v in values
    ]
    return [np.asarray(x).astype(interpret.NUMPY_DTYPES[v.dtype]) for x, v in zip(numbers, values, strict=True)]


def test_every_pass_has_some():
    count = {p: sum(c.startswith(p + "/") for c in golden.CASES) for p in (*golden.PASSES, "emit")}
    assert all(n >= 3 for n in count.values()), count
    assert sum(count.values()) == len(golden.CASES), "a folder that is no pass"
