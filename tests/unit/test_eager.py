"""Calls outside of `jit`: they compile once, and leave nothing behind when the function is gone."""

import gc
import weakref

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import compiler, megakernelize

X = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
USES = {
    "call": lambda f: f(X),
    "jit": lambda f: jax.jit(f)(X),
    "vmap": lambda f: jax.vmap(f)(jnp.stack([X, -X])),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum())(X[:1, :2]),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(X[:, None, :2]),
    "nested": lambda f: megakernelize(lambda x: f(x) + 1, implementation="cpu")(X),
}


def alive():
    """Loaded executables and jaxprs of this process."""
    for _ in range(3):
        gc.collect()
    programs = len(jax.devices()[0].client.live_executables())
    return programs, sum(isinstance(o, jc.ClosedJaxpr | jc.Jaxpr) for o in gc.get_objects())


@pytest.mark.parametrize("use", USES)
def test_a_function_takes_everything_with_it(use):
    """Ten functions, each with an array of its own, used and dropped: not one executable or jaxpr stays."""

    def once(n):
        w = jnp.full((X.shape[1], 8), n)
        fn = lambda x: jnp.tanh(x @ w[: x.shape[1]]) * n
        got, want = (USES[use](f) for f in (megakernelize(fn, implementation="cpu"), fn))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
        return weakref.ref(fn), weakref.ref(w)

    def all_of_them():
        return [r for n in range(10) for r in once(n + 0.375)]

    once(0.5)  # what JAX keeps for the operations around, it keeps once
    compiler.clear_cache()  # a bounded number of programs
    before = alive()
    refs = all_of_them()
    compiler.clear_cache()
    assert all(now <= then for now, then in zip(alive(), before, strict=True)), "what others left may go meanwhile"
    assert not any(r() is not None for r in refs)


def test_the_same_function_compiles_once(monkeypatch):
    compiled = []
    program = compiler.program
    monkeypatch.setattr(compiler, "program", lambda *a, **k: compiled.append(k["name"]) or program(*a, **k))

    def fn(x):
        return jnp.tanh(x) * 0.8125

    for _ in range(3):
        f = megakernelize(fn, implementation="cpu")  # a new wrapper of the same function
        for use in ("call", "vmap", "grad"):
            USES[use](f)
    assert sorted(compiled) == ["fn", "fn", "fn_forward"]
    f(X[:1])
    assert len(compiled) == 4


def test_without_jit():
    f = megakernelize(lambda x: jnp.tanh(x) + 1, implementation="cpu")
    with jax.disable_jit():
        np.testing.assert_allclose(f(X), jnp.tanh(X) + 1, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(jax.jit(f)(X), jnp.tanh(X) + 1, rtol=1e-6, atol=1e-6)
