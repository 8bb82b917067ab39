"""Element-wise primitives and conversions against XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.passes import fuse, simplify
from tests.unit.lowering import close, graph_of, integers, normal, run_graph, same

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 1e-30, 3e4, -3e4, np.inf, -np.inf, np.nan, 1.5, 0.49999997]
X = jnp.concatenate([normal((50,), scale=2.0), jnp.array(SPECIAL, jnp.float32)])
Y = jnp.concatenate([normal((50,), seed=1), jnp.array(SPECIAL[::-1], jnp.float32)])

UNARY = {
    f.__name__: f
    for f in (lax.neg, lax.abs, lax.sign, lax.floor, lax.ceil, lax.exp, lax.exp2, lax.expm1, lax.log, lax.log1p,
              lax.sqrt, lax.rsqrt, lax.cbrt, lax.tanh, lax.sin, lax.cos, lax.tan, lax.logistic, lax.erf, lax.erfc,
              lax.square, lax.is_finite, lax.atan, lax.asin, lax.acos, lax.sinh, lax.cosh, lax.asinh, lax.acosh,
              lax.atanh)
}  # fmt: skip
UNARY |= {"round_even": jnp.round, "round_away": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)}
UNARY |= {f"power {n}": functools.partial(lax.integer_pow, y=n) for n in (0, 1, 2, 3, 7, -1, -2, -3)}
WILD = {"sin", "cos", "tan"}  # at 3e4 the argument reduction decides


FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.__name__)
def test_unary(dtype):
    """All on one graph; XLA's float16 exp2 is exp of a rounded product, and it rounds inside powers."""
    x = X.astype(dtype)
    tame = x[jnp.abs(x) < 1e3]
    have = {n: run_graph(graph_of(f, t), t)[0] for n, f in UNARY.items() for t in [tame if n in WILD else x]}
    want = jax.jit(lambda x, tame: {n: f(tame if n in WILD else x) for n, f in UNARY.items()})(x, tame)
    for n, y in want.items():
        close(have[n], y, 64 if dtype == jnp.float32 else 8 if n == "exp2" or n.startswith("power") else 2, n)


BINARY = [lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min, lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.__name__)
def test_binary(dtype):
    x, y = X.astype(dtype), Y.astype(dtype)
    same(lambda x, y: [f(x, y) for f in BINARY], x, y, ulps=1)
    same(lambda x, y: [lax.pow(x, y), lax.atan2(x, y), lax.pow(x, 3), lax.pow(x, jnp.int32(-2))], x, y,
         ulps=512 if dtype == jnp.float32 else 8)  # fmt: skip


INTS = [jnp.int32, jnp.int16, jnp.int8, jnp.uint32, jnp.uint16, jnp.uint8]


def _full(dtype, seed):
    info = jnp.iinfo(dtype)
    edge = jnp.array([info.min, info.max, 0, 1, info.max, info.min, 0, 2], dtype)
    return jnp.concatenate([integers((40,), int(info.min), int(info.max), dtype, seed), jnp.roll(edge, seed)])


@pytest.mark.parametrize("dtype", INTS, ids=lambda d: d.__name__)
def test_integers(dtype):
    logic = [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor]
    same(lambda x, y: [f(x, y) for f in BINARY + logic], _full(dtype, 0), _full(dtype, 3))
    one = [lax.sign, lax.bitwise_not, lax.population_count, lax.clz, lambda x: lax.integer_pow(x, 3), lambda x: 0 - x]
    one += [lax.neg, lax.abs] if jnp.issubdtype(dtype, jnp.signedinteger) else []
    same(lambda x: [f(x) for f in one], _full(dtype, 0))


@pytest.mark.parametrize("dtype", INTS, ids=lambda d: d.__name__)
def test_shifts(dtype):
    """By less than the width, then by the width or more and by negative amounts."""
    shifts = [lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic]
    for y in integers((48,), 0, jnp.iinfo(dtype).bits, dtype), _full(dtype, 5):
        same(lambda x, y: [f(x, y) for f in shifts], _full(dtype, 0), y)


DTYPES = [*FLOATS, *INTS, jnp.bool_]


@pytest.mark.parametrize("old", DTYPES, ids=lambda d: d.__name__)
def test_convert(old):
    if old == jnp.bool_:
        x = integers((9,), 0, 2).astype(bool)
    elif jnp.issubdtype(old, jnp.integer):
        x = _full(old, 0)
    else:
        x = jnp.concatenate([X, X * 100, jnp.array([1e20, -1e20, 255.5, -128.5, 65504], jnp.float32)]).astype(old)
    same(lambda x: [x.astype(new) for new in DTYPES], x, ulps=0.6)


@pytest.mark.parametrize("old, new", [(jnp.float32, jnp.int32), (jnp.float32, jnp.uint32), (jnp.int32, jnp.float32),
                                      (jnp.uint32, jnp.float32), (jnp.bfloat16, jnp.uint16), (jnp.int32, jnp.uint32),
                                      (jnp.bfloat16, jnp.int16), (jnp.uint16, jnp.bfloat16), (jnp.int8, jnp.uint8),
                                      (jnp.int16, jnp.bfloat16), (jnp.uint8, jnp.int8)])  # fmt: skip
def test_bitcast(old, new):
    x = normal((30,)).astype(old) if jnp.issubdtype(old, jnp.floating) else integers((30,), 0, 100).astype(old)
    same(lambda x: lax.bitcast_convert_type(x, new), x)
    if jnp.issubdtype(old, jnp.floating):
        same(lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(-x, new), old), x)


def test_reduce_precision():
    x = normal((30,))
    same(lambda x: lax.reduce_precision(x, 8, 7), x, ulps=0)
    same(lambda x: lax.reduce_precision(x, 5, 10), x, ulps=0)
    same(lambda x: lax.reduce_precision(x, 8, 23), x, ulps=0)


def test_selection_and_booleans():
    x, y, p = normal((4, 5)), normal((4, 5), seed=1), normal((4, 5), seed=2) > 0
    which = integers((4, 5), 0, 3)
    same(lambda p, x, y: (jnp.where(p, x, y), jnp.where(p, x, 0.0), p & (x > y), p | ~p, p ^ (x > 0)), p, x, y)
    same(lambda w, x, y: lax.select_n(w, x, y, x + y), which, x, y)
    same(lambda p, x, y: lax.select_n(p, x, y), jnp.array(True), x, y)
    same(lambda x, y: (lax.clamp(-0.5, x, 0.5), jnp.clip(x, y, 1.0)), x, y)
    same(lambda p, x: (p.sum(), p.astype(jnp.float32) * x, p.max(axis=0), p.prod()), p, x)
    same(lambda p, q: (p + q, p * q, jnp.maximum(p, q), p < q, p == q), p, x > y)


def test_roundings_are_those_of_the_jaxpr():
    """Every bf16 operation rounds: adding 256 ones that do not fit leaves 256."""
    one = jnp.ones((), jnp.bfloat16)

    def f(x):
        for _ in range(8):
            x = x + one
        return x

    g = graph_of(f, 256 * one)
    assert run_graph(g, 256 * one) == [256] == run_graph(fuse.run(simplify.run(g)), 256 * one)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int8):
        x = normal((1000,), scale=50).astype(dtype)
        g = same(lambda x: (x * 3 + 5) * 7 - x, x, ulps=0, eager=True)
        fused = fuse.run(simplify.run(g))
        assert len(fused.ops) == 1
        np.testing.assert_array_equal(run_graph(fused, x)[0], run_graph(g, x)[0])


def test_scalars_and_weak_types():
    same(lambda x: (x + 1, 2.0 * x, x**2, x**0.5, 1 / x, -x), jnp.float32(3.0), ulps=2)
    same(lambda i: (i + 1, i * 2, i // 3, i % 3, -i // 3, -i % 3), jnp.int32(7))
    same(lambda x: 3.0, jnp.float32(1.0))


def test_operands_of_extent_one_repeat():
    """lax broadcasts extents of 1 in places (`random.uniform` relies on it)."""
    same(jax.nn.softplus, normal((3,)))
    same(lambda x, y: lax.mul(x, y) if x.shape == y.shape else x * y, normal((2, 5)), normal((1, 1)))
    same(lambda x: jax.nn.gelu(x, approximate=False), normal((64,), scale=3.0), ulps=64)
    same(lambda x: jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.relu(x) + jax.nn.leaky_relu(x), normal((64,)))


def test_gradient():
    same(jax.grad(lambda x: (jax.nn.relu(x) * jnp.sin(x) ** 3).sum()), normal((6, 3)))
