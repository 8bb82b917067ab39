"""The table of knobs: environment, overrides, precedence, errors, and the printed table."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import pytest

from jax_mpk import Options, megakernelize, options, override


def test_every_knob_comes_from_its_variable():
    text = {"str": "there", "str | None": "there", "int": "7"}
    for f in dataclasses.fields(Options):
        value = getattr(options.from_environment({options.variable(f.name): text[f.type]}), f.name)
        assert value == (7 if f.type == "int" else "there")
        assert f.metadata["help"]


@pytest.mark.parametrize("value", ["x", "-1", ""])
def test_a_bad_variable_is_named(value):
    with pytest.raises(ValueError, match="JAX_MPK_DEADLINE_MS"):
        options.from_environment({"JAX_MPK_DEADLINE_MS": value})


def test_precedence(monkeypatch):
    monkeypatch.setenv("JAX_MPK_DEADLINE_MS", "1")
    assert options.current().deadline_ms == 1
    with override(deadline_ms=2, workers=5):
        with override(deadline_ms=3):
            assert options.current().deadline_ms == 3 and options.current().workers == 5
            assert options.current({"deadline_ms": 4}) == dataclasses.replace(options.current(), deadline_ms=4)
            assert options.current(Options()).deadline_ms == 60_000, "a complete table is taken as it is"
        assert options.current().deadline_ms == 2
    assert options.current().deadline_ms == 1


def test_override_refuses_unknown_knobs():
    with pytest.raises(TypeError, match="verify"), override(verify=False):
        pass


def test_options_are_read_at_the_trace():
    import jax

    f = megakernelize(lambda x: x + 1, implementation="xla")
    with override(workers=3):
        inside = jax.make_jaxpr(lambda x: f(x))(jnp.ones(2)).eqns[0].params["options"]
    outside = jax.make_jaxpr(lambda x: f(x))(jnp.ones(2)).eqns[0].params["options"]
    assert (inside.workers, outside.workers) == (3, 0)


def test_the_table_prints():
    out = subprocess.run([sys.executable, "-m", "jax_mpk.options"], capture_output=True, text=True, check=True).stdout
    assert all(options.variable(f.name) in out for f in dataclasses.fields(Options))
    assert len(out.splitlines()) == len(dataclasses.fields(Options))
