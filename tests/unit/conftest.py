"""Fixtures of the unit tests."""

import pytest

from jax_mpk import compiler


@pytest.fixture
def counted(monkeypatch):
    """Counts the runs of the first pass: how often something was really compiled."""
    runs = []
    first = compiler.PASSES[0]

    def run(unit):
        runs.append(unit.name)
        return first.run(unit)

    monkeypatch.setattr(compiler, "PASSES", (compiler.Pass(first.name, first.produces, run), *compiler.PASSES[1:]))
    compiler.clear_cache()
    yield runs
    compiler.clear_cache()
