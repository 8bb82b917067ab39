"""Derivatives: those of JAX, with the forward pass as one megakernel, run once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import megakernelize
from tests.functions import CASES, NO_DECODERS, no_decoder

cpu = functools.partial(megakernelize, implementation="cpu")
RNG = np.random.default_rng(5)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X, W, V = normal(4, 32), normal(32, 48), normal(48, 32)


def block(x, w, v):
    """A normalised, gated block with a residual: two contractions, a row reduction, maps."""
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + jnp.tanh(h @ w) @ v


def close(got, want, tolerance=1e-4):
    """The order of sums differs, and sums of sums amplify it: relative to the largest element."""

    def same(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1 + np.abs(b).max(initial=0)))

    jax.tree.map(same, got, want)


def is_float(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def loss(fn):
    """A scalar of all float results, not linear in them."""
    return lambda *a: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(fn(*a)) if is_float(y))


def kernels(fn, *args):
    return jax.jit(fn).lower(*args).as_text().count("jax_mpk_cpu")


NO_GRADIENT = {"concatenate, argmax", "nested, argmax", "argmin", "search", "bits of other widths",  # of no float results
               "pooling", "pooling, spread", "pooling by a function", "ragged dot, gradient", "scatter extremes",
               "scatter extremes, narrow", "scatter by functions", "next after", "cumulative extremes, gradient"}  # fmt: skip
"""Functions of which JAX has no derivative."""
LOADS = {"waves", "wide", "wide, types", "wide, rows", "wide, pieces"}
"""Functions that are about how elements are loaded, with too many or infinite ones for a tolerance of derivatives."""
NO_KERNEL = {"special functions": "polygamma"}
"""Functions whose forward pass has a gap that they have not."""
FUNCTIONS = {n: c for n, c in CASES.items() if n not in NO_GRADIENT | LOADS and any(map(is_float, c[1]))}
FUNCTIONS |= {n: no_decoder(n, 3, np.float32) for n in NO_DECODERS}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_grad_of_every_function(case):
    """With respect to all float operands, against JAX; the only custom call is the forward pass."""
    fn, args = FUNCTIONS[case]
    args = [jnp.asarray(a) for a in args]
    where = tuple(i for i, a in enumerate(args) if is_float(a))
    tolerance = 0.03 if any(a.dtype in (jnp.bfloat16, jnp.float16) for a in args) else 1e-4
    got, want = (jax.jit(jax.grad(loss(f), where)) for f in (cpu(fn), fn))
    if case in NO_KERNEL:
        with pytest.warns(
            jax_mpk.MegakernelWarning, match=rf"_forward\) hands a part of the function .* to XLA: {NO_KERNEL[case]}"
        ):
            close(got(*args), want(*args), tolerance)
    else:
        close(got(*args), want(*args), tolerance)
        assert kernels(got, *args) == 1


def test_the_forward_pass_is_the_megakernel_and_runs_once():
    f = jax.jit(jax.value_and_grad(loss(cpu(block)), (0, 1, 2)))
    text = f.lower(X, W, V).compile().as_text()
    assert text.count('custom_call_target="jax_mpk_cpu"') == 1
    assert "tanh" not in text and "rsqrt" not in text, "XLA computes the linear part alone"
    close(f(X, W, V), jax.value_and_grad(loss(block), (0, 1, 2))(X, W, V))


def test_eager_gradients_compile_once(monkeypatch):
    from jax_mpk import compiler

    compiled = []
    program = compiler.program
    monkeypatch.setattr(compiler, "program", lambda *a, **k: compiled.append(k["name"]) or program(*a, **k))
    g = jax.grad(loss(cpu(block)), 1)
    for n in range(3):
        close(g(X + n, W, V), jax.grad(loss(block), 1)(X + n, W, V))
    assert compiled == ["block_forward"]


def test_forward_mode_has_one_kernel_too():
    f = lambda f: lambda x, t: jax.jvp(lambda x: f(x, W, V), (x,), (t,))
    t = normal(4, 32)
    close(f(cpu(block))(X, t), f(block)(X, t))
    close(jax.jit(f(cpu(block)))(X, t), f(block)(X, t))
    assert kernels(f(cpu(block)), X, t) == 1


def row(x):
    return jnp.sum(jnp.tanh(x @ W) ** 2) + jax.nn.logsumexp(x)


HIGHER = {
    "hessian": lambda f: jax.hessian(f),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "third": lambda f: lambda x: jax.jvp(jax.hessian(lambda y: f(y)), (x,), (x,))[1],
}


@pytest.mark.parametrize("kind", HIGHER)
def test_higher_derivatives(kind):
    x = X[0, :]
    close(HIGHER[kind](cpu(row))(x), HIGHER[kind](row)(x))
    close(jax.jit(HIGHER[kind](cpu(row)))(x), HIGHER[kind](row)(x))


def test_with_vmap_on_either_side():
    xs = jnp.stack([X, 2 * X, -X])
    per_row = lambda f: jax.vmap(jax.grad(loss(f)), (0, None, None))
    close(per_row(cpu(block))(xs, W, V), per_row(block)(xs, W, V))
    assert kernels(per_row(cpu(block)), xs, W, V) == 1
    whole = lambda f: jax.grad(lambda x, w: jnp.sum(jax.vmap(lambda x: f(x, w, V))(x) ** 2), (0, 1))
    close(whole(cpu(block))(xs, W), whole(block)(xs, W))
    assert kernels(whole(cpu(block)), xs, W) == 1


def test_vmap_keeps_what_is_not_mapped_as_it_is():
    f = cpu(lambda x, y: (x + 1, y * 2, x * y))
    axes = ((0, None), (0, None, 0))
    got = jax.vmap(f, *axes)(X, X[0])
    close(got, (X + 1, X[0] * 2, X * X[0]))
    close(jax.vmap(f, None, None, axis_size=3)(X, X), (X + 1, X * 2, X * X))


def test_control_flow_around():
    def scanned(f, x):
        return jnp.sum(lax.scan(lambda c, _: (f(c, W, V), c.sum()), x, None, 3)[0] ** 2)

    def branched(f, x):
        return jnp.sum(lax.cond(x[0, 0] > 0, lambda x: f(x, W, V), jnp.sin, x) ** 2)

    def looped(f, x):
        return jnp.sum(lax.fori_loop(0, 3, lambda _, c: f(c, W, V), x))

    for fn in (scanned, branched, looped):
        for wrap in (jax.grad, lambda g: jax.grad(jax.checkpoint(g))):
            got, want = (jax.jit(wrap(functools.partial(fn, f)))(X) for f in (cpu(block), block))
            close(got, want, 1e-3)
    assert kernels(jax.grad(functools.partial(scanned, cpu(block))), X) == 1


def test_what_is_inside():
    @jax.custom_jvp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defjvp(lambda p, t: (clipped(*p), 3 * t[0]))

    @jax.custom_vjp
    def reversed_(x):
        return jnp.sin(x)

    reversed_.defvjp(lambda x: (jnp.sin(x), (x, 7.0)), lambda r, g: (g * r[0] * r[1],))

    def f(x, w, i, key):
        h = clipped(x @ w) + reversed_(x @ w)
        h = jax.checkpoint(lambda h: jnp.tanh(h) * jax.random.uniform(key, h.shape))(h)
        h = lax.scan(lambda c, y: (c * 0.5 + y, None), h[0], h)[0] + lax.stop_gradient(h.max())
        return h * i, i + 1, x.argmax(), cpu(jnp.cos)(h)

    args = X, W, jnp.int32(3), jax.random.key(1)
    close(jax.grad(loss(cpu(f)), (0, 1))(*args), jax.grad(loss(f), (0, 1))(*args))
    assert kernels(jax.grad(loss(cpu(f)), (0, 1)), *args) == 1
    primal, back = jax.vjp(lambda x: cpu(f)(x, *args[1:]), X)
    float0 = np.zeros((), jax.dtypes.float0)
    ones = jnp.ones_like(primal[0]), float0, float0, jnp.ones_like(primal[3])
    close(back(ones), jax.vjp(lambda x: f(x, *args[1:]), X)[1](ones))


def test_what_has_no_tangent():
    f = cpu(lambda x, i, y: (x * 2, i + 1, y * i, jnp.ones(3)))
    g = lambda x: f(x, jnp.int32(3), X)
    out, tangent = jax.jvp(g, (X,), (X,))
    close(out, (X * 2, 4, X * 3, jnp.ones(3)))
    close((tangent[0], tangent[2], tangent[3]), (X * 2, 0 * X, jnp.zeros(3)))
    assert tangent[1].dtype == jax.dtypes.float0
    zero = np.zeros((), jax.dtypes.float0)
    out, tangent = jax.jvp(lambda i: f(X, i, X), (jnp.int32(3),), (zero,))
    close(out, (X * 2, 4, X * 3, jnp.ones(3)))
    close(tangent[2], 0 * X)


def test_under_a_mesh():
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Auto,))
    for check in (True, False):
        sharded = lambda f, check=check: jax.shard_map(
            lambda x, w: f(x, w, V), mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"), check_vma=check
        )
        square = lambda f: lambda x, w, g=sharded: jnp.sum(g(f)(x, w) ** 2)
        got, want = (jax.jit(jax.grad(square(f), (0, 1)))(X, W) for f in (cpu(block), block))
        close(got, want)


def test_an_unsupported_forward_pass_warns_and_stays_right():
    """The function is a megakernel; a derivative never raises for what only its forward pass cannot do."""
    f = cpu(lambda x: lax.digamma(x) + 0.125)
    close(f(X), lax.digamma(X) + 0.125)
    with pytest.warns(jax_mpk.MegakernelWarning, match="hands a part of the function"):
        close(jax.grad(lambda x: f(x).sum())(X), jax.grad(lambda x: lax.digamma(x).sum())(X))
