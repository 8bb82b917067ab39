"""The compiler driver: passes as data, stages, times, dumps, and the caches of programs."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import Options, abi, backends, compiler, device, megakernelize
from jax_mpk.device import CPU
from jax_mpk.fingerprint import Unhashable, fingerprint
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.tasks import TaskGraph

X = jnp.arange(32.0).reshape(4, 8)
W = jnp.ones((8, 64))


def trace(f=lambda x, w: jnp.tanh(x @ w) * 2, *args):
    return jax.make_jaxpr(f)(*(args or (X, W)))


def test_every_stage_is_kept_and_timed():
    f = megakernelize(lambda x, w: jnp.tanh(x @ w) * 2, implementation="cpu")
    lowered = f.lower(X, W)
    names = [p.name for p in compiler.PASSES]
    assert list(lowered.compile_times) == names and all(t >= 0 for t in lowered.compile_times.values())
    assert isinstance(lowered.jaxpr, jc.ClosedJaxpr)
    for p in compiler.PASSES:
        assert lowered.text(p.name)
        if p.produces == "graph":
            assert isinstance(lowered.graph(p.name), Graph)
        if p.produces == "tasks":
            assert isinstance(lowered.tasks(p.name), TaskGraph)
    assert lowered.graph() is lowered.graph("refine") and lowered.tasks() is lowered.tasks("memory")
    assert lowered.certificate.tasks == lowered.tasks().tasks
    assert abi.decode(lowered.program).header["workspace"] == lowered.tasks().workspace
    assert "tanh" in lowered.text("jaxpr") and lowered.text("program").startswith("program version")
    with pytest.raises(KeyError, match="fuse"):
        lowered.graph("confuse")
    with pytest.raises(KeyError, match="decompose"):
        lowered.text("confuse")


def test_lower_takes_shapes_and_shows_what_a_call_runs():
    f = megakernelize(lambda x, w: jnp.tanh(x @ w) * 2, implementation="cpu")
    shape = jax.ShapeDtypeStruct
    program = f.lower(shape((4, 8), jnp.float32), shape((8, 64), jnp.float32)).program
    text = jax.jit(f).lower(X, W).as_text()
    assert program.hex().upper() in text


def test_lower_of_nothing_and_of_unsupported():
    with pytest.raises(jax_mpk.UnsupportedError, match="computes nothing"):
        megakernelize(lambda x: x).lower(X)
    with pytest.raises(jax_mpk.UnsupportedError, match=r"cholesky\(float32\[4,4\]"):
        megakernelize(lambda x: jax.lax.linalg.cholesky(x @ x.T)).lower(X)


def test_lower_under_a_mesh():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    f = megakernelize(lambda x: x * 2, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    assert f.lower(X).jaxpr.in_avals[0].shape == (2, 8)


def test_stop_after():
    f = megakernelize(lambda x: x * 3, options={"stop_after": "fuse"})
    lowered = f.lower(X)
    assert isinstance(lowered.graph(), Graph) and "decompose" not in lowered.compile_times
    with pytest.raises(KeyError):
        lowered.tasks()
    with pytest.warns(jax_mpk.MegakernelWarning, match="stopped after pass 'fuse'"):
        np.testing.assert_array_equal(f(X), X * 3)
    with pytest.raises(ValueError, match="stop_after='confuse' is no pass; the passes are lower, simplify"):
        megakernelize(lambda x: x * 3, options={"stop_after": "confuse"}).lower(X)


def test_dump(tmp_path):
    def doubled(x):
        return x * 2

    megakernelize(doubled, implementation="cpu", options={"dump": str(tmp_path)})(X)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("doubled-")
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["00_jaxpr.txt", *(f"{n:02d}_{p.name}.txt" for n, p in enumerate(compiler.PASSES, 1))]
    assert (folder / names[1]).read_text().startswith("graph doubled(")
    (listing,) = folder.glob("*_emit.txt")
    assert listing.read_text().startswith("program version")


def test_targets_are_adjusted_and_part_of_the_key(counted):
    from jax_mpk import backends

    cpu = backends.get("cpu")
    assert cpu.device(Options()) == CPU
    assert cpu.device(Options(workers=5, tasks=7, columns=32)).workers == 5
    f = lambda x, w: x @ w
    args = jnp.ones((64, 256)), jnp.ones((256, 512))
    few = compiler.compile(trace(f, *args), cpu.device(Options(columns=64)), Options(columns=64))
    many = compiler.compile(trace(f, *args), cpu.device(Options(columns=16, tasks=64)), Options(columns=16, tasks=64))
    assert len(counted) == 2 and few.program != many.program


def test_two_processes_compile_the_same_program(tmp_path):
    """The key and the blob do not depend on the process: hash seeds, addresses, order of sets."""
    code = """
        import jax, jax.numpy as jnp
        from jax_mpk import compiler, Options
        from jax_mpk.device import CPU
        def f(x, i):
            y = jax.nn.softmax(jnp.take(x, i, axis=0)) + jax.nn.relu(x).sum()
            return jax.lax.fori_loop(0, 2, lambda _, c: jnp.sin(c), y)
        try:
            compiler.program(jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.arange(3)), CPU, Options())
        except NotImplementedError:
            pass
        print(compiler.key_of(jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.arange(3)), CPU, Options(), "fn").hex())
    """
    out = []
    for seed in ("1", "2"):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": seed,
            "JAX_MPK_CACHE_DIR": str(tmp_path / seed),
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        out.append((done.stdout, [(f.name, f.read_bytes()) for f in (tmp_path / seed).glob("*")]))
    assert out[0][0] == out[1][0] and len(out[0][0]) == 65
    assert out[0][1] == out[1][1]


DIFFERENT = [
    (lambda x, w: x * 0.1, lambda x, w: x * 0.10000001),
    (lambda x, w: x * 0.0, lambda x, w: x * -0.0),
    (lambda x, w: x[1:3], lambda x, w: x[0:2]),
    (lambda x, w: x + np.arange(8.0, dtype=np.float32), lambda x, w: x + np.arange(8.0, dtype=np.float32)[::-1]),
    (lambda x, w: (x + 1, x * 2), lambda x, w: (x * 2, x + 1)),
    (lambda x, w: x.sum(0), lambda x, w: x.sum(1)),
    (lambda x, w: x - w[0, 0], lambda x, w: w[0, 0] - x),
    (
        lambda x, w: jax.lax.fori_loop(0, 3, lambda i, c: c + i, x),
        lambda x, w: jax.lax.fori_loop(0, 4, lambda i, c: c + i, x),
    ),
    (lambda x, w: jax.jit(jnp.sin)(x), lambda x, w: jax.jit(jnp.cos)(x)),
    (lambda x, w: x.astype(jnp.bfloat16), lambda x, w: x.astype(jnp.float16)),
    (lambda x, w: jnp.dot(x, w, precision="highest"), lambda x, w: jnp.dot(x, w)),
]


@pytest.mark.parametrize(("f", "g"), DIFFERENT)
def test_fingerprints_tell_functions_apart(f, g):
    assert fingerprint(trace(f, X, W)) == fingerprint(trace(lambda x, w: f(x, w), X, W))
    assert fingerprint(trace(f, X, W)) != fingerprint(trace(g, X, W))


def test_fingerprints_ignore_derivatives_and_lines():
    @jax.custom_jvp
    def f(x):
        return x * 2

    @jax.custom_jvp
    def g(x):
        return x * 2

    f.defjvp(lambda p, t: (f(*p), t[0] * 2))
    g.defjvp(lambda p, t: (g(*p), t[0] * 3))
    assert fingerprint(trace(lambda x, w: f(x))) == fingerprint(trace(lambda x, w: g(x)))


def test_what_has_no_stable_text_is_not_cached():
    class Thing:
        pass

    p = jc.Primitive("thing")
    p.def_abstract_eval(lambda x, thing: x)
    closed = trace(lambda x, w: p.bind(x, thing=Thing()))
    with pytest.raises(Unhashable, match="Thing"):
        fingerprint(closed)
    with pytest.raises(jax_mpk.UnsupportedError, match="thing"):
        compiler.program(closed, CPU, Options())


def test_the_cpu_target_is_this_machine():
    backend = backends.get("cpu")
    assert backend.device(Options()) == device.cpu(os.cpu_count() or 2)
    assert backend.device(Options(workers=24)) == device.cpu(24)
