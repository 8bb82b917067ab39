"""`megakernelize` itself: arguments, tracing, captured arrays, forwarded outputs, pytrees. No compiler is involved."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_mpk
from jax_mpk import megakernelize
from jax_mpk.primitive import megakernel_p

xla = functools.partial(megakernelize, implementation="xla")
X = jnp.arange(6.0).reshape(2, 3)


def kernels(fn, *args):
    """The megakernel equations of a function, at any depth."""

    def walk(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive is megakernel_p:
                yield e
            for p in e.params.values():
                if hasattr(p, "eqns") and e.primitive is not megakernel_p:
                    yield from walk(p)

    return list(walk(jax.make_jaxpr(fn)(*args)))


def test_is_a_function_and_a_decorator():
    def double(x):
        """Twice x."""
        return x * 2

    @megakernelize(implementation="xla")
    def triple(x):
        return x * 3

    wrapped = megakernelize(double, implementation="xla")
    assert wrapped.__name__ == "double" and wrapped.__doc__ == "Twice x." and wrapped.__wrapped__ is double
    assert "double" in repr(wrapped)
    np.testing.assert_array_equal(wrapped(X), X * 2)
    np.testing.assert_array_equal(triple(X), X * 3)
    assert kernels(triple, X)[0].params["name"] == "triple"


def test_decorates_a_method_of_a_flax_module():
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.full((3, 4), 2.0))

        @megakernelize(implementation="xla")
        def __call__(self, x):
            return x @ self.w[...]

    net = Net()
    np.testing.assert_array_equal(net(X), X @ jnp.full((3, 4), 2.0))
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(net, X), net(X))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"implementation": "gpu"}, ValueError, "'cuda', 'cpu', 'xla'"),
        ({"in_specs": jax.P()}, ValueError, "need a mesh"),
        ({"options": {"treads": 3}}, TypeError, "treads"),
        ({"options": {"deadline_ms": "soon"}}, TypeError, "deadline_ms takes int"),
        ({"options": {"deadline_ms": -1}}, ValueError, "deadline_ms is at least 0"),
        ({"options": {"seed": 1 << 63}}, ValueError, "seed is at most 9223372036854775807"),
        ({"options": 3}, TypeError, "mapping of knobs"),
        ({"static_argnames": "y"}, ValueError, "no arguments of"),
        ({"static_argnums": 4}, ValueError, "1 positional arguments"),
    ],
)
def test_wrong_arguments_fail_at_once(kwargs, error, text):
    with pytest.raises(error, match=text):
        megakernelize(lambda x: x, **kwargs)


def test_wrong_types():
    with pytest.raises(TypeError, match="takes a function, not int"):
        megakernelize(3)
    with pytest.raises(ValueError, match="needs in_specs and out_specs"):
        megakernelize(lambda x: x, mesh=jax.make_mesh((1,), ("i",)))
    with pytest.raises(TypeError, match="str"):
        xla(lambda x: x)("text")
    with pytest.raises(ValueError, match="'mode' is a list, which is not hashable"):
        xla(lambda x, mode: x, static_argnames="mode")(X, mode=[1])


def test_traces_only_when_it_must():
    count = 0

    @megakernelize(implementation="xla", static_argnames="n")
    def f(x, n=1):
        nonlocal count
        count += 1
        return x * n

    f(X), f(X + 1), jax.jit(f)(X)
    assert count == 1
    f(X, 2), f(X, n=2)
    assert count == 3  # positional and by name are two spellings, as in jax.jit
    f(X, 2), f(X, 1)
    assert count == 4
    f(X[:1])
    assert count == 5
    f(X.astype(jnp.bfloat16))
    assert count == 6
    f(X, 2.0), f(X, True)
    assert count == 8  # 2 == 2.0 and 1 == True, but they are different static values


def test_the_same_types_are_one_primitive():
    """Equal calls share one jaxpr object, so eager calls and lowerings find what they compiled before."""
    f = xla(lambda x: jnp.sin(x) + 1)
    a, b = kernels(lambda x, y: (f(x), f(y)), X, X)
    assert a.params["jaxpr"] is b.params["jaxpr"] and a.params == b.params


def test_static_arguments():
    @megakernelize(implementation="xla", static_argnums=(-1, 0))
    def f(power, x, scale):
        return scale * x**power

    np.testing.assert_array_equal(f(2, X, 3.0), 3 * X**2)
    np.testing.assert_array_equal(f(2, X, scale=3.0), 3 * X**2)
    np.testing.assert_array_equal(f(x=X, power=2, scale=3.0), 3 * X**2)
    assert len(kernels(lambda x: f(2, x, 3.0), X)[0].invars) == 1


def test_captured_arrays_are_operands():
    w = jnp.arange(12.0).reshape(3, 4)
    big = np.ones((300, 100), np.float32)
    small = np.arange(4.0, dtype=np.float32)
    inner = jax.jit(lambda y: y * w.sum() + jnp.sum(big))

    def f(x):
        return inner(x @ w + small) + inner(x @ w)

    (e,) = kernels(xla(f), X)
    shapes = sorted(v.aval.shape for v in e.invars)
    assert shapes == [(2, 3), (3, 4), (300, 100)], "w once, although two functions capture it; the large table; x"
    assert [np.shape(c) for c in e.params["jaxpr"].consts] == [(4,)], "a small NumPy table stays a constant"
    np.testing.assert_allclose(xla(f)(X), f(X), rtol=1e-6)


def test_captured_tracers():
    @jax.jit
    def outer(x, w):
        return xla(lambda y: jnp.tanh(y) @ w)(x), jax.grad(lambda v: xla(lambda y: (y @ v).sum())(x))(w)

    w = jnp.ones((3, 4))
    out, grad = outer(X, w)
    np.testing.assert_allclose(out, jnp.tanh(X) @ w, rtol=1e-6)
    np.testing.assert_allclose(grad, jnp.broadcast_to(X.sum(0)[:, None], (3, 4)), rtol=1e-6)


def test_outputs_that_are_inputs_do_not_enter():
    w = jnp.ones(3)

    def f(x, unused, y):
        z = x + y
        return {"x": x, "z": z, "again": z, "w": w, "four": 4.0, "none": None}

    (e,) = kernels(xla(f), X, X, X)
    assert len(e.invars) == 2 and len(e.outvars) == 1
    out = xla(f)(X, X, 1.0)
    assert out["x"] is X and out["w"] is w and out["none"] is None and float(out["four"]) == 4.0
    assert out["z"] is out["again"]
    assert kernels(xla(lambda x: (x, 1)), X) == []


def test_pytrees_and_modules():
    net = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(net)

    @xla
    def f(state, x, extra):
        y = nnx.merge(graph, state)(x) + extra["b"]
        return y, state, (y.sum(), extra)

    y, state2, (total, extra) = f(state, X, extra={"b": jnp.ones(4), "none": None})
    np.testing.assert_allclose(y, net(X) + 1, rtol=1e-6)
    assert jax.tree.structure(state2) == jax.tree.structure(state) and extra["none"] is None and total.shape == ()
    module = xla(lambda m, x: (m(x), m))(net, X)[1]
    assert isinstance(module, nnx.Linear)


def test_weak_types_and_scalars():
    f = xla(lambda x, y: x * y)
    assert f(2.0, 3).weak_type and float(f(2.0, 3)) == 6
    assert f(jnp.bfloat16(2), 3.0).dtype == jnp.bfloat16
    assert f(np.float64(2), 3).dtype == jnp.float32


def test_nested():
    inner = xla(lambda x: x * 2)
    outer = xla(lambda x: inner(x) + inner(x + 1))
    assert len(kernels(outer, X)) == 1
    np.testing.assert_array_equal(outer(X), 4 * X + 2)


def test_side_effects_are_left_to_xla(capfd):
    def f(x):
        jax.debug.print("x = {}", x)
        return x + 1

    with pytest.warns(
        jax_mpk.MegakernelWarning, match=r"(?s)hands the function to XLA: debug_.*test_api.py:\d+ \("
    ) as seen:
        assert float(megakernelize(f)(1.0)) == 2
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        megakernelize(f)(1.0)  # once is enough
        xla(f)(1.0)  # what was asked for
    jax.effects_barrier()
    assert capfd.readouterr().out.count("x = 1.0") == 3
    with pytest.raises(jax_mpk.UnsupportedError, match="side effect"):
        megakernelize(f, implementation="cpu")(1.0)
