"""The table of knobs: environment, overrides, precedence, errors, and the printed table."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import Options, megakernelize, options, override
from jax_mpk.device import SHARED


def test_every_knob_comes_from_its_variable():
    text = {"str": ("there", "there"), "str | None": ("there", "there"), "int": ("7", 7), "bool": ("off", False)}
    for f in dataclasses.fields(Options):
        own = {
            "arch": ("sm_80", "sm_80"),
            "stop_after": ("fuse", "fuse"),
            "split": ("on", True),
        }
        given, want = own.get(f.name, text[f.type])
        value = getattr(options.from_environment({options.variable(f.name): given}), f.name)
        assert value == want and value != f.default
        assert f.metadata["help"]


@pytest.mark.parametrize("value", ["x", "-1", ""])
def test_a_bad_variable_is_named(value):
    with pytest.raises(ValueError, match="JAX_MPK_DEADLINE_MS"):
        options.from_environment({"JAX_MPK_DEADLINE_MS": value})


INTS = [f.name for f in dataclasses.fields(Options) if f.type == "int"]


@pytest.mark.parametrize("name", INTS)
def test_every_number_has_bounds(name):
    """`workers=10**9` once took all memory: what is out of bounds is named, wherever it comes from."""
    least, most = (Options.__dataclass_fields__[name].metadata[k] for k in ("least", "most"))
    assert least <= Options.__dataclass_fields__[name].default <= most
    for value, words in ((most + 1, f"option {name} is at most {most}, not {most + 1}"), (10**30, "at most"),
                         (least - 1, f"option {name} is at least {least}, not {least - 1}")):  # fmt: skip
        for give in (Options, options.current, lambda **k: override(**k).__enter__()):
            with pytest.raises(ValueError, match=words):
                give(**{name: value}) if give is not options.current else give({name: value})
        with pytest.raises(ValueError, match=f"{options.variable(name)}.*{words}"):
            options.from_environment({options.variable(name): str(value)})


def test_the_largest_numbers_are_harmless():
    """A program for as many workers, tasks and narrow columns as the bounds allow; threads and deadlines run."""
    most = {f.name: f.metadata["most"] for f in dataclasses.fields(Options) if f.type == "int"}
    planned = {k: most[k] for k in ("workers", "tasks")} | {"columns": 1}
    run = {k: most[k] for k in ("threads", "deadline_ms", "cache_bytes", "cache_entries")}
    x, w = np.ones((3, 40), np.float32), np.ones((40, 300), np.float32)
    for knobs in (planned | run, {"columns": most["columns"]} | run, {"seed": most["seed"]}):
        f = megakernelize(lambda x, w: jnp.tanh(x @ w), implementation="cpu", options=knobs | {"cache_dir": ""})
        np.testing.assert_allclose(f(x, w), np.tanh(x @ w), rtol=1e-6)


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
    run = subprocess.run([sys.executable, "-m", "jax_mpk"], capture_output=True, text=True, check=True)
    out = run.stdout
    assert "Warning" not in run.stderr
    assert all(options.variable(f.name) in out for f in dataclasses.fields(Options))
    assert len(out.splitlines()) == len(dataclasses.fields(Options))


@pytest.mark.parametrize("knobs,words", [
    ({"arch": "hopper"}, "sm_90a"), ({"window": 0}, "at least 1"), ({"ring": 3}, "more than the window of 3"),
    ({"ring": 4, "window": 5}, "more than the window of 5"),
])  # fmt: skip
def test_knobs_of_the_cuda_backend_are_checked(knobs, words):
    with pytest.raises(ValueError, match=words):
        Options(**knobs)
    with pytest.raises(ValueError, match=words):
        options.from_environment({options.variable(k): str(v) for k, v in knobs.items()})


def test_a_switch_is_a_bool():
    assert options.from_environment({"JAX_MPK_STREAM": "on"}).stream is True
    with pytest.raises(ValueError, match="JAX_MPK_STREAM='maybe'"):
        options.from_environment({"JAX_MPK_STREAM": "maybe"})
    with pytest.raises(TypeError, match="stream takes bool"):
        Options(stream=0)
    with pytest.raises(TypeError, match="ring takes int"):
        Options(ring=True)


def test_knobs_of_the_cuda_backend_change_the_program_and_the_source():
    """Where there is no GPU: the device that the knobs describe, and what is generated for it."""
    from jax_mpk import abi
    from jax_mpk.backends.cuda import backend as cuda
    from jax_mpk.backends.cuda.build import text
    from jax_mpk.errors import UnsupportedError

    default = Options()
    for knobs in ({"arch": "sm_80"}, {"stream": False}, {"ring": 5}, {"window": 2}):
        assert Options(**knobs).codegen() != default.codegen()
        assert cuda.device(Options(**knobs)) != cuda.device(default)

    def step(x, w):
        return jnp.tanh(x @ w)

    args = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((256, 512), jnp.bfloat16)

    def program(**knobs):
        o = Options(cache_dir="", cache_entries=0, **knobs)
        return abi.decode(megakernelize(step, implementation="cuda", options=o).lower(*args).program)

    ring = lambda **knobs: int(program(**knobs)["Kernel"][0]["ring"])  # noqa: E731
    assert ring() > 0 and ring(ring=5, window=2) == 5
    assert "#define MPK_WINDOW 2" in text(program(window=2))
    assert ring(stream=False) == ring(arch="sm_80") == 0
    assert program(arch="sm_80")["Kernel"][0]["shared"] <= SHARED[80]
    with pytest.raises(UnsupportedError, match=r"8\.0"):
        cuda.device(Options(arch="sm_75"))
