"""Functions that no instruction computes, against float64; bits; the total order."""

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special as scipy
from jax import lax

from tests.execute import Runner
from tests.unit.lowering import graph_of, integers, normal, run_graph, same

INF, NAN = np.inf, np.nan
SPECIAL = [
    0.0,
    -0.0,
    INF,
    -INF,
    NAN,
    1.0,
    -1.0,
    2.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    3.0,
    3.5,
    8.0,
    1024.0,
    1e-30,
    -1e-30,
    3e38,
    2.0**-126,
]


def _spread(low, high, count=4000):
    """Uniform between the bounds, and of all magnitudes there."""
    r = np.random.default_rng(0)
    far = np.exp(r.uniform(-80, np.log(max(abs(low), abs(high))), count))
    x = np.concatenate([r.uniform(low, high, count), r.uniform(max(low, -9), min(high, 9), count), far, -far])
    return x[(x >= low) & (x <= high)]


def _scipy_digamma(x):
    """As XLA has it: nan at the poles, zero included."""
    return np.where((x <= 0) & (x == np.floor(x)), NAN, scipy.digamma(x))


def _scipy_lgamma(x):
    return np.where(np.isinf(x), INF, scipy.gammaln(x))


FUNCTIONS = {
    "erf_inv": (lax.erf_inv, scipy.erfinv, (-1, 1), 5), "erfc": (lax.erfc, scipy.erfc, (-4, 9), 6),
    "lgamma": (lax.lgamma, _scipy_lgamma, (0, 1e30), 8), "digamma": (lax.digamma, _scipy_digamma, (0, 1e30), 5),
    "sinh": (lax.sinh, np.sinh, (-89, 89), 5), "cosh": (lax.cosh, np.cosh, (-89, 89), 5),
    "asinh": (lax.asinh, np.arcsinh, (-1e30, 1e30), 5), "acosh": (lax.acosh, np.arccosh, (1, 1e30), 5),
    "atanh": (lax.atanh, np.arctanh, (-1, 1), 5), "asin": (lax.asin, np.arcsin, (-1, 1), 5),
    "acos": (lax.acos, np.arccos, (-1, 1), 5), "atan": (lax.atan, np.arctan, (-1e30, 1e30), 5),
}  # fmt: skip
"""The function, what it should be in float64, where, and how many units in the last place it may be off."""


def _unary(name, dtype=None):
    """A function that binds a primitive of JAX's later versions, which the frontend knows by its name."""
    p = jc.Primitive(name)
    p.def_abstract_eval(lambda *xs: xs[0] if dtype is None else xs[0].update(dtype=np.dtype(dtype)))
    return p.bind


def _ulps(have, want):
    """Distances in units of the last place of float32; 0 where both are the same infinity or NaN."""
    with np.errstate(all="ignore"):
        near = want.astype(np.float32)
        unit = np.maximum(np.spacing(np.abs(near)), np.float32(2.0**-149)).astype(np.float64)
        off = np.abs(have.astype(np.float64) - want) / unit
    return np.where((have == near) | (np.isnan(have) & np.isnan(want)), 0.0, np.where(np.isnan(off), INF, off))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name):
    f, exact, (low, high), most = FUNCTIONS[name]
    x = _spread(low, high).astype(np.float32)
    x = np.concatenate([x, np.array(SPECIAL, np.float32)])
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
    inside = ((x >= low) & (x <= high)) | ~np.isfinite(want) | ~np.isfinite(x)
    for have in (run_graph(graph_of(f, x), x)[0], Runner(f, x)()[0]):
        off = np.where(inside, _ulps(have, want), 0)
        worst = off.argmax()
        assert off[worst] <= most, f"{name}({x[worst]!r}) = {have[worst]!r}, not {want[worst]!r}"


def test_log2():
    f = _unary("log2")
    x = np.concatenate(
        [np.exp(np.random.default_rng(0).uniform(-85, 85, 4000)), np.random.default_rng(1).uniform(0.5, 2, 4000)]
    )
    x = np.concatenate([x, SPECIAL]).astype(np.float32)
    with np.errstate(all="ignore"):
        want = np.log2(x.astype(np.float64))
    for have in (run_graph(graph_of(f, x), x)[0], Runner(f, x)()[0]):
        assert _ulps(have, want).max() <= 4
    powers = np.exp2(np.arange(-126, 128)).astype(np.float32)
    np.testing.assert_array_equal(run_graph(graph_of(f, powers), powers)[0], np.arange(-126, 128))


@pytest.mark.parametrize("name, most", [("lgamma", 1e-6), ("digamma", 2e-6)])
def test_gamma_functions_of_negative_numbers(name, most):
    """They have zeros between their poles: the error is small beside the terms whose difference they are."""
    f, exact, _, _ = FUNCTIONS[name]
    x = np.random.default_rng(0).uniform(-12, 0, 5000).astype(np.float32)
    x = np.concatenate([x, np.array([-1, -2, -5, -(2.0**23), -3e38, -1e-30], np.float32)])
    want = exact(x.astype(np.float64))
    have = run_graph(graph_of(f, x), x)[0]
    poles = x == np.floor(x)
    np.testing.assert_array_equal(have[poles], want[poles].astype(np.float32))
    distance = np.abs(x - np.round(x.astype(np.float64)))[~poles]
    size = np.abs(np.log(distance)) + 20 if name == "lgamma" else 1 / distance + 3  # the terms of the reflection
    assert (np.abs(have[~poles] - want[~poles]) / size).max() < most


def test_normal_numbers():
    """`jax.random.normal` is erf_inv of uniform bits: the bits are JAX's, so the numbers are, too."""
    for key in (jax.random.key(7), jax.random.PRNGKey(3)):
        same(lambda k: (jax.random.normal(k, (50,)), jax.random.truncated_normal(k, -1.0, 2.0, (9,))), key, ulps=64)
        same(lambda k: jax.random.normal(k, (50,), jnp.bfloat16), key, ulps=4)
        same(lambda k: jax.random.laplace(k, (50,)), key, ulps=64)
    same(lambda k: jax.random.bits(jax.random.clone(k), (5,)), jax.random.key(1))


def test_one_minus_square():
    f = _unary("one_minus_square")
    x = normal((400,), scale=0.9)
    have, want = run_graph(graph_of(f, x), x)[0], 1 - np.asarray(x, np.float64) ** 2
    assert _ulps(have, want).max() <= 2
    i = integers((30,), -9, 9)
    np.testing.assert_array_equal(run_graph(graph_of(f, i), i)[0], 1 - np.asarray(i) ** 2)


# ----------------------------------------------------------------------------------------------------------------- bits

FLOATS = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
WORD = {"f32": np.uint32, "bf16": np.uint16, "f16": np.uint16}


@pytest.mark.parametrize("name", FLOATS)
def test_nextafter(name):
    dtype = FLOATS[name]
    big = ml_dtypes.finfo(dtype).max
    edges = np.array([0, -0.0, 1, -1, INF, -INF, NAN, big, -big, 2.0**-14, 2.0**-24, 1.5], np.float32).astype(dtype)
    x = np.concatenate([np.asarray(normal((100,))).astype(dtype), edges])
    with np.errstate(over="ignore"):
        double = x * dtype(2)
    for y in (np.ones_like(x), double, -x, np.full_like(x, NAN), x, np.full_like(x, -INF)):
        have = Runner(lax.nextafter, x, y)()[0]
        with np.errstate(over="ignore"):
            want = np.nextafter(x, y)
        same_bits = (have.view(WORD[name]) == want.view(WORD[name])) | ((x == y) & (have == want))
        assert (same_bits | (np.isnan(have.astype(np.float32)) & np.isnan(want.astype(np.float32)))).all()


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_all_bits_of_narrow_floats(name):
    """There and back for every pattern, but that of a NaN may change."""
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    nan = np.isnan(bits.view(FLOATS[name]).astype(np.float32))
    for integer in (jnp.uint16, jnp.int16):
        words = bits.view(integer)
        f = lambda x: lax.bitcast_convert_type(x, FLOATS[name])  # noqa: E731
        back = lambda x: lax.bitcast_convert_type(x, integer)  # noqa: B023, E731
        have = Runner(f, words)()[0]
        assert (have.view(np.uint16) == bits)[~nan].all() and np.isnan(have.astype(np.float32))[nan].all()
        assert (Runner(back, words.view(FLOATS[name]))()[0] == words)[~nan].all()


WIDTHS = [(jnp.float32, jnp.uint8), (jnp.float32, jnp.bfloat16), (jnp.int32, jnp.int16), (jnp.uint32, jnp.int8),
          (jnp.float16, jnp.uint8), (jnp.bfloat16, jnp.int8), (jnp.int16, jnp.uint8), (jnp.float32, jnp.float16)]  # fmt: skip


@pytest.mark.parametrize("wide, narrow", WIDTHS, ids=lambda d: d.__name__)
def test_bits_of_other_widths(wide, narrow):
    x = normal((3, 5), scale=30).astype(wide)
    same(lambda x: lax.bitcast_convert_type(x, narrow), x, ulps=0)
    parts = lax.bitcast_convert_type(x, narrow)
    same(lambda x: lax.bitcast_convert_type(x, wide), parts, ulps=0)
    same(lambda x: lax.bitcast_convert_type(x.T[:2].T * 1 if x.shape[-1] == 2 else x, wide), parts, ulps=0)


@pytest.mark.parametrize("name", ["lt_to", "le_to", "eq_to"])
def test_total_order(name):
    """-NaN < -inf < ... < -0 < 0 < ... < inf < NaN, in every float type; integers as they are."""
    f = _unary(name, np.bool_)
    x = np.array([-NAN, -INF, -2.5, -1e-30, -0.0, 0.0, 1e-30, 1.0, INF, NAN], np.float32)
    x.view(np.uint32)[[0, -1]] = [0xFFC00000, 0x7FC00000]
    a, b = (np.ascontiguousarray(v) for v in np.broadcast_arrays(x[:, None], x[None]))
    rank = np.arange(10)
    compare = {"lt_to": np.less, "le_to": np.less_equal, "eq_to": np.equal}[name]
    np.testing.assert_array_equal(Runner(f, a, b)()[0], compare(rank[:, None], rank[None]))
    i, j = integers((40,), -5, 5, jnp.int8), integers((40,), -5, 5, jnp.int8, seed=1)
    np.testing.assert_array_equal(run_graph(graph_of(f, i, j), i, j)[0], compare(np.asarray(i), np.asarray(j)))


def test_searching_and_counting():
    x, y = jnp.sort(normal((30,))), normal((12,), seed=1)
    same(lambda x, y: (jnp.searchsorted(x, y), jnp.searchsorted(x, y, side="right", method="sort"),
                       jnp.searchsorted(x, y, method="compare_all"), jnp.digitize(y, x)), x, y)  # fmt: skip
    same(lambda y: jnp.histogram(y, bins=5)[0], y)
