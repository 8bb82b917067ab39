"""Values that a function wants somewhere: in parts on a mesh, in other memory. Never dropped without a word."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import Options, compiler, megakernelize, primitive
from jax_mpk.device import CPU
from jax_mpk.fingerprint import fingerprint

cpu = functools.partial(megakernelize, implementation="cpu")
X = jnp.asarray(np.random.default_rng(2).normal(size=(8, 4)), jnp.float32)


def mesh(n, kind=AxisType.Auto):
    return jax.make_mesh((n,), ("i",), devices=jax.devices("cpu")[:n], axis_types=(kind,))


def constraint(n, *spec):
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh(n), P(*spec)))


PARTS = {
    "with_sharding_constraint": constraint(2, "i"),
    "with_sharding_constraint, columns": constraint(4, None, "i"),
    "device_put": lambda x: jax.device_put(x, NamedSharding(mesh(2), P("i"))),
    "device_put to the host": lambda x: jax.device_put(x, jax.memory.Space.Host),
    "jit": jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh(2), P("i"))),
    "nested": jax.jit(lambda x: constraint(2, "i")(x) * 2),
}
WHOLE = {
    "one device": constraint(1, "i"),
    "replicated": constraint(4),
    "unconstrained": constraint(4, P.UNCONSTRAINED),
    "device_put": jax.device_put,
    "device_put to this device": lambda x: jax.device_put(x, jax.devices()[0]),
    "jit": jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh(4), P())),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_refused_by_name(kind, monkeypatch):
    monkeypatch.setattr(primitive, "_warned", set())
    place = PARTS[kind]

    def f(x):
        return jnp.tanh(place(x + 1)) - 1

    with pytest.raises(jax_mpk.UnsupportedError, match=r"cannot be placed as .*\n  at .*test_placement.py:\d+ \("):
        cpu(f)(X)
    with pytest.warns(jax_mpk.MegakernelWarning, match="cannot be placed") as seen:
        out = jax.jit(megakernelize(f))(X)
    assert len(seen) == 1
    np.testing.assert_allclose(out, jax.jit(f)(X), rtol=1e-6)
    assert out.sharding == jax.jit(f)(X).sharding, "XLA does what was asked for"


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_whole_on_each_device_stays_a_megakernel(kind):
    place = WHOLE[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = jax.jit(megakernelize(lambda x: jnp.tanh(place(x + 1)) - 1))
        np.testing.assert_allclose(f(X), jnp.tanh(jax.jit(place)(X + 1)) - 1, rtol=1e-5, atol=1e-6)
        assert "jax_mpk_cpu" in f.lower(X).as_text()


def test_explicit_shardings():
    with jax.set_mesh(mesh(2, AxisType.Explicit)):
        with pytest.raises(jax_mpk.UnsupportedError, match=r"reshard.*cannot be placed"):
            jax.jit(cpu(lambda x: jax.sharding.reshard(x * 2, P("i"))))(X)


def test_an_inner_jit_in_parts_does_not_find_the_program_of_one_that_is_whole():
    """Their jaxprs differ in what the fingerprint leaves out of an inner `jit` otherwise."""

    def traced(**where):
        return jax.make_jaxpr(lambda x: jax.jit(lambda x: x * 2.5, **where)(x))(X)

    parts = traced(out_shardings=NamedSharding(mesh(2), P("i")))
    whole = traced(out_shardings=NamedSharding(mesh(2), P()))
    assert fingerprint(parts) != fingerprint(traced()) == fingerprint(whole)
    options = Options(cache_dir="")
    compiler.program(whole, CPU, options)
    with pytest.raises(jax_mpk.UnsupportedError, match="cannot be placed"):
        compiler.program(parts, CPU, options)
