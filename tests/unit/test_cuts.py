"""Functions cut around what megakernels do not do."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import cuts, trace
from jax_mpk.errors import UnsupportedError
from tests.functions import data

SPLIT = {"split": True}


def kernels(f, *args) -> int:
    """Megakernels in the module of a jitted function."""
    return f.lower(*args).as_text().count("@jax_mpk_cpu")


def run(f, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        wrapped = jax.jit(jax_mpk.megakernelize(f, **options))
        return kernels(wrapped, *args), wrapped(*args)


def solved(x, w, v):
    """Two cuts, one after the other, and results of every piece."""
    h = jnp.tanh(x @ w)
    q, r = jnp.linalg.qr(h)
    y = jax.nn.softmax(q @ v)
    z = jnp.linalg.inv(r @ r.T + jnp.eye(r.shape[0]))
    return y + 1, z @ z, h * 2


def searched(x, w):
    """A loop whose length nobody knows, inside of calls."""

    @jax.jit
    def inner(x):
        n, y = jax.lax.while_loop(
            lambda c: jnp.sum(c[1] ** 2) > 1.0, lambda c: (c[0] + 1, jnp.tanh(c[1] * 0.5)), (0, x)
        )
        return n, jax.nn.gelu(y)

    n, y = jax.checkpoint(inner)(x @ w)
    return n, y @ w.T, jnp.arange(3) * 2


def early(x, w):
    """What the loop needs comes first; the rest of the function does not wait for it."""
    top = jax.lax.while_loop(lambda v: v > 1.0, lambda v: v * 0.5, jnp.max(x * 3))
    return jax.nn.softmax(jnp.tanh(x @ w) @ w.T) * top


def padded(x):
    """Rules that ask for a constant find it in every piece."""
    zero = jnp.float32(0) * 1
    s = jnp.linalg.svd(jax.lax.pad(x, zero, ((1, 1, 0), (0, 0, 0))), compute_uv=False)
    return jax.lax.pad(s * 2, zero, ((2, 0, 0),))


def spectral(x):
    """Values of a type that no kernel has are XLA's, and what reads them."""
    f = jnp.fft.rfft(jnp.sin(x))
    return jnp.abs(f) * 2, jnp.cumsum(jnp.real(f * jnp.conj(f)))


CASES = {
    "solved": (solved, (data(8, 16), data(16, 8), data(8, 12)), 3),
    "searched": (searched, (data(8, 8), data(8, 8)), 3),
    "early": (early, (data(8, 8), data(8, 8)), 3),
    "padded": (padded, (data(5, 7),), 2),
    "spectral": (spectral, (data(4, 16),), 2),
}


@pytest.mark.parametrize("options", [{}, {"implementation": "cpu", "options": SPLIT}], ids=["None", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_the_rest_is_megakernels(name, options):
    f, args, count = CASES[name]
    found, got = run(f, *args, **options)
    assert found == count
    for a, b in zip(got, jax.jit(f)(*args), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_named_implementation_raises_unless_it_may_cut(name):
    f, args, _ = CASES[name]
    with pytest.raises(UnsupportedError, match=r"test_cuts.py:\d+"):
        jax.jit(jax_mpk.megakernelize(f, implementation="cpu"))(*args)


def test_one_warning_names_what_is_cut():
    _, args, _ = CASES["solved"]

    def fresh(*args):  # of which nobody has warned
        return solved(*args)

    with pytest.warns(jax_mpk.MegakernelWarning) as seen:
        jax.jit(jax_mpk.megakernelize(fresh))(*args)
    (text,) = [str(w.message) for w in seen if issubclass(w.category, jax_mpk.MegakernelWarning)]
    assert "hands a part of the function (the rest is in 3 pieces; predicted cost " in text
    assert "qr(float32[8,8])" in text and "lu(float32[8,8])" in text and "test_cuts.py:" in text


def test_explain_shows_cuts_and_pieces():
    f, args, _ = CASES["solved"]
    text = jax_mpk.megakernelize(f).explain(*args)
    assert "cut into 3 megakernels" in text and "XLA: qr" in text and "because qr(" in text
    assert all(f"solved_{n} for cpu" in text for n in range(3))
    with pytest.raises(UnsupportedError):
        jax_mpk.megakernelize(f, implementation="cpu").explain(*args)


def test_updates_stay_in_place():
    """A donated cache that a piece updates is not copied."""

    def step(cache, x):
        q, _ = jnp.linalg.qr(jnp.tanh(x))
        return jax.lax.dynamic_update_slice(cache, q, (2, 0)), q @ q.T

    cache, x = jnp.asarray(data(64, 8)), data(8, 8)
    want = jax.jit(step)(cache, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        f = jax.jit(jax_mpk.megakernelize(step), donate_argnums=0)
        where = cache.unsafe_buffer_pointer()
        got = f(cache, x)
    assert got[0].unsafe_buffer_pointer() == where
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_derivatives_and_batches_are_cut_too():
    f = lambda x, w: jnp.sum(jnp.linalg.slogdet(x @ w)[1] * jnp.tanh(x))  # noqa: E731
    x, w = data(3, 6, 6), data(6, 6)
    each = jax.vmap(f, (0, None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        got = jax.jit(jax.grad(lambda x: jax.vmap(jax_mpk.megakernelize(f), (0, None))(x, w).sum()))(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: each(x, w).sum())(x), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_cut():
    assert cuts.cut(jax.make_jaxpr(lambda x: x + 1)(1.0), "cpu") is None, "nothing is refused"
    assert cuts.cut(jax.make_jaxpr(jnp.fft.fft)(jnp.ones(4, jnp.complex64)), "cpu") is None, "nothing is left"


def test_flat_jaxprs_of_nested_calls():
    """Results of calls inside of calls, handed up as they are; captured arrays."""
    table = jnp.asarray(data(4))
    inner = jax.jit(lambda x: jnp.sin(x) + table)
    middle = jax.jit(lambda x: inner(inner(x)))
    f = lambda x: (middle(x), inner(x), x)  # noqa: E731
    closed = jax.make_jaxpr(f)(table)
    flat = trace.flat(closed)
    assert {e.primitive.name for e in flat.jaxpr.eqns} == {"sin", "add"}
    for a, b in zip(jax.extend.core.jaxpr_as_fun(flat)(table), f(table), strict=True):
        np.testing.assert_array_equal(a, b)
    found, got = run(f, table)
    assert found == 1
    for a, b in zip(got, jax.jit(f)(table), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
