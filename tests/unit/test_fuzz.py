"""A few of the fuzzer's functions (`python -m tests.fuzz` draws as many as one likes), and that it sees a wrong result."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fuzz import run, shrink
from tests.fuzz.grow import grow


@pytest.mark.parametrize("seed", range(48))
def test_on_the_executor(seed):
    case = grow(seed)
    v = run.verdict(case)
    assert not v.bad, f"{v.kind}: {v.text}\n{case.source()}"


@pytest.mark.parametrize("seed", range(100, 110))
def test_on_the_emulator(seed):
    case = grow(seed)
    v = run.verdict(case, "emulator")
    assert not v.bad, f"{v.kind}: {v.text}\n{case.source()}"


def test_one_wrong_element_is_seen_and_the_case_shrinks(monkeypatch):
    def damaged(*a: object) -> list[np.ndarray]:
        out = [x.copy() for x in right(*a)]
        for x in out:
            if x.dtype == np.float32 and x.size:
                x.reshape(-1)[-1] += 1.0
        return out

    right = run._direct
    monkeypatch.setattr(run, "_direct", damaged)
    cases = [c for c in map(grow, range(40)) if c.transform == "" and len(c.lines) > 3]
    bad = [c for c in cases if run.verdict(c).kind == "differs"]
    assert bad
    small = shrink.shrink(bad[0], lambda c: run.verdict(c).kind == "differs")
    assert len(small.lines) < len(bad[0].lines)
