"""Loops and branches that XLA runs, around megakernels."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import control
from jax_mpk.errors import UnsupportedError
from tests.functions import data
from tests.unit.test_cuts import run


def decode(w, cache, token):
    """A loop as samplers write it: a cache that is updated, tokens, a condition on both."""

    def more(s):
        return (s[0] < 6) & jnp.any(s[2] >= 0)

    def step(s):
        n, cache, token, out = s
        h = w[token]
        cache = lax.dynamic_update_slice(cache, h[:, None], (0, n, 0))
        p = jax.nn.softmax(jnp.where(jnp.arange(cache.shape[1]) <= n, jnp.einsum("bd,bsd->bs", h, cache), -1e9))
        logits = jnp.einsum("bs,bsd->bd", p, cache) @ w.T
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return n + 1, cache, token, lax.dynamic_update_slice(out, token[:, None], (0, n))

    return lax.while_loop(more, step, (0, cache, token, jnp.full((token.shape[0], 8), -1, jnp.int32)))


def swapped(x, y):
    """What is carried is exactly what the body computes, in another order."""
    return lax.while_loop(lambda c: c[2] < 7, lambda c: (jnp.sin(c[1]), c[0] * 0.5 + 1, c[2] + 1), (x, y, 0))


def long(h, xs):
    """Too long to be written out, backwards, with rows in and out and a value that does not change."""

    def step(h, x):
        a, b = jnp.split(jnp.tanh(x * h + 0.1), 2)
        h = jnp.concatenate([b, a]) * 0.9 + jnp.cumsum(x) * 0.01
        return h, (h[:2], jnp.max(h))

    return lax.scan(step, h, xs, reverse=True)


def nested(x):
    """A loop of unknown length in one that is too long, in a branch."""

    def inner(x):
        return lax.while_loop(lambda c: jnp.max(c) > 1, lambda c: c * 0.5 - 0.1, x * 4)

    def outer(x):
        return lax.fori_loop(0, 3000, lambda n, c: 0.1 * inner(c + n % 3) + 0.2 * jnp.sin(c) - 0.3 * jnp.tanh(c), x)

    return lax.cond(jnp.sum(x) > 1e6, lambda x: x * 2, outer, x)


def branches(n, x):
    """XLA has a part of one branch."""
    return lax.switch(n, [jnp.sin, lambda x: jnp.linalg.qr(x)[1] @ x, lambda x: x @ x.T @ x], x + 1)


def keys(seed, x):
    def step(s):
        n, key, x = s
        key, sub = jax.random.split(key)
        return n + 1, key, x + jax.random.uniform(sub, x.shape)

    n, key, x = lax.while_loop(lambda s: jnp.max(s[2]) < 5, step, (0, jax.random.key(seed), x))
    return n, jax.random.key_data(key), x


CASES = {
    "decode": (decode, (data(32, 16), np.zeros((2, 8, 16), np.float32), np.array([3, 5], np.int32)), 1),
    "swapped": (swapped, (data(4, 6), data(4, 6)), 1),
    "long": (long, (data(6), data(4000, 6)), 1),
    "nested": (nested, (data(5),), 4),
    "branches": (branches, (np.int32(1), data(6, 6)), 4),
    "keys": (keys, (np.uint32(7), data(3, 4)), 2),
}


@pytest.mark.parametrize("options", [{}, {"implementation": "cpu", "options": {"split": True}}], ids=["None", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_bodies_are_megakernels(name, options):
    f, args, least = CASES[name]
    found, got = run(f, *args, **options)
    assert found >= least
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(f)(*args)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("loop", ["fori", "while", "scan"])
def test_a_loop_around_a_megakernel_goes_on(loop, count):
    """XLA takes the operands of a call that is the root of a body for values that the loop leaves as they are."""
    step = lambda c: tuple(x * 2 + n for n, x in enumerate(c))  # noqa: E731
    f = jax_mpk.megakernelize(step, implementation="cpu")

    def of(step):
        def loop_(*c):
            if loop == "while":
                return lax.while_loop(lambda c: c[0][0] < 100, step, c)
            if loop == "fori":
                return lax.fori_loop(0, 5, lambda _, c: step(c), c)
            return lax.scan(lambda c, _: (step(c), None), c, None, length=5)[0]

        return jax.jit(loop_)

    c = [np.full(n + 2, n + 1, np.float32) for n in range(count)]
    for a, b in zip(of(f)(*c), of(step)(*c), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cache_that_is_carried_stays_in_place():
    w, cache, token = CASES["decode"][1]
    want = jax.jit(decode)(w, cache, token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        cache = jnp.asarray(cache)
        where = cache.unsafe_buffer_pointer()
        got = jax.jit(jax_mpk.megakernelize(decode), donate_argnums=1)(w, cache, token)
    assert got[1].unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(got[3], want[3])


def test_derivatives_and_batches_of_loops():
    h, xs = data(3, 6), data(2500, 6)
    f = lambda h, xs: jnp.sum(long(h, xs)[0])  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        got = jax.jit(jax.vmap(jax.grad(jax_mpk.megakernelize(f)), (0, None)))(h, xs)
    np.testing.assert_allclose(got, jax.vmap(jax.grad(f), (0, None))(h, xs), rtol=1e-3, atol=1e-3)


def test_a_warning_and_explain_say_who_runs_the_loop():
    f, args, _ = CASES["swapped"]
    fresh = lambda *args: f(*args)  # noqa: E731  of which nobody has warned
    with pytest.warns(jax_mpk.MegakernelWarning, match="is XLA's, a kernel does what it repeats"):
        jax.jit(jax_mpk.megakernelize(fresh))(*args)
    text = jax_mpk.megakernelize(f).explain(*args)
    assert "XLA: while, around\n    megakernel 0: " in text and "swapped_0 for cpu" in text
    with pytest.raises(UnsupportedError, match=r"test_control.py:\d+"):
        jax.jit(jax_mpk.megakernelize(f, implementation="cpu"))(*args)


def test_an_equation_without_bodies_has_none():
    eqn = jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns[0]
    assert not control.has_bodies(eqn)


@pytest.mark.parametrize("length", [4000, 4001, 4003])
@pytest.mark.parametrize("reverse", [False, True])
def test_small_iterations_go_together(length, reverse):
    """Also where some are left over, in front or behind; rows in and out."""

    def f(h, xs):
        def step(h, x):
            h = jnp.tanh(h * 0.9 + x) - 0.1 * jnp.flip(h)
            return h, h * x

        return lax.scan(step, h, xs, reverse=reverse)

    h, xs = data(4), data(length, 4)
    found, got = run(f, h, xs)
    assert found == (1 if length == 4000 else 2)
    for a, b in zip(got, jax.jit(f)(h, xs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    text = jax.jit(jax_mpk.megakernelize(f, options={"choose": False})).lower(h, xs).as_text()
    assert text.count("stablehlo.while") == 1, "a loop of loops"


def test_a_loop_of_large_iterations_is_not_written_out():
    """Nobody named an implementation: each iteration is a megakernel, and compiling takes no longer than for one."""

    def f(x, w):
        def step(_, x):
            for _ in range(60):
                x = x + jnp.tanh(x @ w) * 0.1 - jnp.mean(x) + jax.nn.softmax(x)
            return x

        return lax.fori_loop(0, 5, step, x)

    x, w = data(1, 512), data(512, 512)
    m = jax_mpk.megakernelize(f, options={"choose": True, "cache_dir": ""})
    text = m.explain(x, w)
    assert "XLA: scan, around\n    megakernel 0: " in text
    np.testing.assert_allclose(jax.jit(m)(x, w), jax.jit(f)(x, w), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vma", [True, False])
def test_collectives_inside_of_loops(vma):
    """A tensor-parallel step in a loop: XLA has the loop and its psum, each device its megakernels."""

    def f(x, w, v):
        def step(c):
            n, x = c
            return n + 1, x * 0.5 + lax.psum(jax.nn.gelu(x @ w) @ v, "d") * 0.1

        n, x = lax.while_loop(lambda c: (c[0] < 6) & (jnp.max(c[1]) < 99), step, (0, x))
        x, means = lax.scan(lambda x, _: (x + lax.pmean(jnp.sin(x @ w) @ v, "d"), jnp.mean(x)), x, length=3)
        return n, lax.psum(jnp.tanh(x @ w) @ v, "d"), means

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")
    args = data(2, 16), data(16, 32), data(32, 16)
    specs = {"in_specs": (P(), P(None, "d"), P("d", None)), "out_specs": P(), "mesh": mesh, "check_vma": vma}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        sharded = jax.jit(jax.shard_map(jax_mpk.megakernelize(f), **specs))
        text = sharded.lower(*args).as_text()
        assert text.count("@jax_mpk_cpu") >= 4 and text.count("stablehlo.all_reduce") == 3
        got = sharded(*args)
    for a, b in zip(got, jax.jit(jax.shard_map(f, **specs))(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
