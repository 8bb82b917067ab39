"""Flax: what a wrapped function does to a module arrives at the caller, as with `nnx.jit`; what cannot, raises."""

import functools
import gc
import subprocess
import sys
import weakref

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import megakernelize
from jax_mpk.primitive import megakernel_p

X = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)), jnp.float32)


mk = functools.partial(megakernelize, implementation="cpu")


class Cache(nnx.Variable):
    pass


class Net(nnx.Module):
    """A norm with statistics, a dropout that counts, a cache, an array and a number as attributes."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.cache = Cache(jnp.zeros((5, 4)))
        self.table = jnp.arange(4.0)
        self.calls = 0

    def __call__(self, x):
        y = self.drop(self.norm(self.linear(x)))
        for block in self.blocks:
            y = block(y)
        self.cache[...] = self.cache[...].at[1].set(y[0])
        return y * self.table


class OnlyObject(nnx.Object):
    """What is no pytree."""

    def __init__(self):
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.count[...] += 1
        return x * 2


def call(net, x):
    return net(x)


def values(node):
    state = nnx.state(node)
    return {str(p): np.asarray(jax.random.key_data(v[...]) if isinstance(v, nnx.RngKey) else jax.tree.leaves(v)[0])
            for p, v in nnx.to_flat_state(state)}  # fmt: skip


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def changed(a, b):
    return {k for k in a if not np.array_equal(a[k], b[k])}


WAYS = {
    "eager": lambda mk: mk(call),
    "in nnx.jit": lambda mk: nnx.jit(mk(call)),
    "around nnx.jit": lambda mk: mk(nnx.jit(call)),
    "by keyword": lambda mk: lambda net, x: mk(lambda x, *, net: net(x))(x, net=net),
    "in a tree": lambda mk: lambda net, x: mk(lambda tree: tree["a"][0](tree["x"]))({"a": [net], "x": x}),
    "a method": lambda mk: lambda net, x: mk(net.__call__)(x),
    "the module itself": lambda mk: lambda net, x: mk(net)(x),
    "with a static argument": lambda mk: mk(lambda n, net, x: [net(x) for _ in range(n)][0], static_argnums=0),
    "in nnx.remat": lambda mk: nnx.remat(mk(call)),
    "in a megakernel": lambda mk: mk(mk(call)),
    "as plain XLA": lambda mk: megakernelize(call, implementation="xla"),
}


@pytest.mark.parametrize("way", WAYS)
def test_updates_arrive(way):
    """Three steps: the outputs and every Variable are those of the plain function, and the same objects are still there."""
    want, got = Net(), Net()
    objects = [v for _, v in nnx.iter_graph(got) if isinstance(v, nnx.Variable | nnx.Module)]
    before = values(got)
    f = WAYS[way](mk)
    for n in range(3):
        x = X + n
        args = (1, got, x) if way == "with a static argument" else (got, x)
        same(f(*args), call(want, x))
        same(values(got), values(want))
    moved = changed(before, values(got))
    assert {"('norm', 'mean')", "('blocks', 1, 'var')", "('drop', 'rngs', 'count')", "('cache',)"} <= moved
    assert "('linear', 'kernel')" not in moved
    assert [v for _, v in nnx.iter_graph(got) if isinstance(v, nnx.Variable | nnx.Module)] == objects
    got.extra = 1  # still a module of this trace level
    got.linear.kernel[...] = jnp.ones((3, 4))


def test_it_is_a_megakernel_and_traced_once():
    count = 0

    def step(net, x):
        nonlocal count
        count += 1
        return net(x)

    net = Net()
    for _ in range(3):
        megakernelize(step, implementation="xla")(net, X)
    assert count == 1
    graph, state = nnx.split(net)

    def pure(state):
        net = nnx.merge(graph, state)
        y = megakernelize(step, implementation="xla")(net, X)
        return y, nnx.state(net)

    (eqn,) = [e for e in jax.make_jaxpr(pure)(state).eqns if e.primitive is megakernel_p]
    n_variables = len(jax.tree.leaves(state))
    assert len(eqn.invars) <= n_variables + 2, "the arrays of the module, X and the table"
    assert len(eqn.outvars) == 1 + 4 + 1 + 1, "the result, the statistics, the count, the cache: not what stays"


def test_gradients():
    def loss(net, x):
        return jnp.mean(net(x) ** 2)

    a, b = Net(), Net()
    for n in range(2):
        same(nnx.value_and_grad(mk(loss))(a, X + n)[0], nnx.value_and_grad(loss)(b, X + n)[0])
        same(values(nnx.grad(mk(loss))(a, X + n)), values(nnx.grad(loss)(b, X + n)))
        same(values(a), values(b))
    assert changed(values(a), values(Net()))

    def train(loss, net, optimizer, x):
        value, grads = nnx.value_and_grad(loss)(net, x)
        optimizer.update(net, grads)
        return value

    nets = [Net(), Net(), Net()]
    optimizers = [nnx.Optimizer(n, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for n in nets]
    for n in range(2):
        same(
            mk(functools.partial(train, loss))(nets[0], optimizers[0], X + n),
            train(loss, nets[1], optimizers[1], X + n),
        )
        nnx.jit(functools.partial(train, mk(loss)))(nets[2], optimizers[2], X + n)
        for net, optimizer in zip(nets[::2], optimizers[::2], strict=True):
            same(values(net), values(nets[1]))
            same(values(optimizer), values(optimizers[1]))


def test_transformations_of_nnx():
    def stacked(seed=0):
        return nnx.vmap(lambda key: Net2(nnx.Rngs(key)))(jax.random.split(jax.random.key(seed), 3))

    class Net2(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    a, b = stacked(), stacked()
    same(nnx.vmap(mk(call), in_axes=(0, None))(a, X), nnx.vmap(call, in_axes=(0, None))(b, X))
    same(values(a), values(b))

    def layers(f):
        return nnx.scan(lambda x, net: f(net, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

    same(layers(mk(call))(X, a), layers(call)(X, b))
    same(values(a), values(b))
    assert changed(values(a), values(stacked()))


def test_the_structure_may_change():
    def grow(net, x):
        net.calls += 1
        if not hasattr(net, "seen"):
            net.seen = nnx.Variable(jnp.zeros(()))
        net.seen[...] += x.sum()
        net.linear, net.other = nnx.Linear(3, 4, rngs=nnx.Rngs(7), kernel_init=nnx.initializers.ones), net.linear
        net.table = net.table + x.sum()
        return net(x)

    a, b, c = Net(), Net(), Net()
    kept, norm = a.linear, a.norm
    for n in range(2):
        want = grow(b, X + n)
        same(mk(grow)(a, X + n), want)
        same(nnx.jit(mk(grow))(c, X + n), want)
        for net in (a, c):
            same(values(net), values(b))
            assert net.calls == b.calls == n + 1
    assert a.norm is norm and a.other is not kept, "grown twice: the first `other` is gone"


def test_an_array_that_is_an_attribute():
    def shift(net, x):
        net.table = net.table + 1
        return x

    net = Net()
    same(mk(shift)(net, X), X)
    same(net.table, jnp.arange(4.0) + 1)


def test_shared_and_repeated():
    class Pair(nnx.Module):
        def __init__(self):
            self.a, self.b = Net(), Net(1)
            self.b.norm = self.a.norm

        def __call__(self, x):
            return self.a(x) + self.b(x)

    a, b = Pair(), Pair()
    same(mk(call)(a, X), call(b, X))
    same(values(a), values(b))
    assert a.a.norm is a.b.norm

    def both(m, n, x):
        assert m is n
        return m(x) - 2 * n(x)

    a, b = Net(), Net()
    same(mk(both)(a, a, X), both(b, b, X))
    same(values(a), values(b))

    def variables(norm, mean, x):
        mean[...] = mean[...] + 1
        return norm(x)

    a, b = (nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))
    same(mk(variables)(a, a.mean, X), variables(b, b.mean, X))
    same(values(a), values(b))


def test_what_is_returned_is_the_callers():
    def f(net, x):
        new = nnx.Linear(4, 4, rngs=nnx.Rngs(3), kernel_init=nnx.initializers.ones)
        new.net = net
        return net(x), net, {"norm": net.norm, "new": new}

    net = Net()
    for g in (mk(f), nnx.jit(mk(f))):
        _, again, out = g(net, X)
        assert again is net and out["norm"] is net.norm and out["new"].net is net
        same(out["new"].kernel[...], jnp.ones((4, 4)))


def test_what_is_no_pytree():
    a = OnlyObject()
    for _ in range(2):
        same(mk(call)(a, X), 2 * X)
        nnx.jit(mk(call))(a, X)
    assert a.count[...] == 4
    assert "mul" in megakernelize(call, implementation="cpu").lower(a, X).text("jaxpr")


def test_states_are_trees_of_variables():
    """`nnx.merge` makes a module of the very Variables of a state, so their updates are seen in the state."""
    nets = Net(), Net()
    (graph, a), (_, b) = map(nnx.split, nets)

    def f(state, x):
        return nnx.merge(graph, state)(x)

    same(mk(f)(a, X), f(b, X))
    same(values(nets[0]), values(nets[1]))
    y, state = jax.jit(lambda s, x: (mk(f)(s, x), s))(a, X)
    same(y, f(b, X))
    nnx.update(nets[0], state)
    same(values(nets[0]), values(nets[1]))


def test_jax_transformations_return_what_changed():
    """`jax.jit` drops updates of its argument, with or without a megakernel: what was updated is returned."""
    step = lambda f: jax.jit(lambda net, x: (f(net, x), net))
    a, b = Net(), Net()
    same(step(mk(call))(a, X)[0], step(call)(b, X)[0])
    assert not changed(values(a), values(Net()))
    same(values(step(mk(call))(a, X)[1]), values(step(call)(b, X)[1]))


@pytest.mark.parametrize("train", [True, False])
def test_a_module_from_outside_of_a_trace(train):
    """It may be read. An update raises, where `nnx.jit` does, with the path; and nothing was touched."""
    net = Net()
    net.norm.set_attributes(use_running_average=not train)
    net.eval()
    before = values(net)
    evaluate = lambda net, x: net.norm(net.linear(x))
    if train:
        net.train()
        for f in (call, evaluate):
            with pytest.raises(flax.errors.TraceContextError):
                other = Net()
                jax.jit(lambda x, f=f, other=other: nnx.jit(f)(other, x))(X)
        with pytest.raises(
            jax_mpk.StateError, match=r"args\[0\]\.norm\.mean \(BatchStat\) is updated, but it was made outside"
        ):
            jax.jit(lambda x: mk(evaluate)(net, x))(X)
        with pytest.raises(jax_mpk.StateError, match=r"kwargs\['net'\]\.norm\.mean"):
            jax.jit(lambda x: mk(lambda x, net: evaluate(net, x))(x, net=net))(X)

        def attribute(net, x):
            net.new = nnx.Variable(x)
            return x

        with pytest.raises(jax_mpk.StateError, match=r"args\[0\].*made outside"):
            jax.jit(lambda x: mk(attribute)(net, x))(X)
    else:
        same(jax.jit(lambda x: mk(evaluate)(net, x))(X), evaluate(net, X))
        y, again = jax.jit(lambda x: mk(lambda net, x: (evaluate(net, x), net.linear))(net, x))(X)
        same(y, evaluate(net, X))
    assert not changed(before, values(net))
    net.extra = 3
    mk(call)(net, X)
    assert changed(before, values(net)) or not train


def test_a_module_that_a_function_closes_over():
    """Reading it is fine; updating it raises in the function, as under `nnx.jit`."""
    net = Net()
    f = lambda x: net.norm(net.linear(x))
    for g in (mk(f), nnx.jit(f), nnx.jit(mk(f)), jax.jit(mk(f))):
        with pytest.raises(flax.errors.TraceContextError, match="BatchStat"):
            g(X)
    net.eval()
    same(mk(f)(X), f(X))


def test_under_a_mesh():
    mesh = jax.make_mesh((2,), ("i",), devices=jax.devices("cpu")[:2], axis_types=(AxisType.Auto,))
    net = Net()
    sharded = functools.partial(mk, mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i"))
    same(sharded(lambda net, x: net.linear(x))(net, X), net.linear(X))
    with pytest.raises(jax_mpk.StateError, match=r"args\[0\]\.norm\.mean, args\[0\]\.norm\.var: .*return what changed"):
        sharded(lambda net, x: net.norm(net.linear(x)))(net, X)


def test_nothing_is_kept():
    """A function and a module that are gone leave no trace in tables of ours."""

    def once():
        net = Net()
        fn = lambda net, x: net(x) + 1
        mk(fn)(net, X)
        return weakref.ref(net), weakref.ref(fn), weakref.ref(net.linear.kernel[...])

    refs = [r for _ in range(3) for r in once()]
    gc.collect()
    assert not any(r() is not None for r in refs)


def test_variables_that_are_references():
    """Mutable arrays are effects: no megakernel, and no update is lost."""

    def f(v, x):
        v[...] = v[...] + x.sum()
        return v[...] * x

    variable = nnx.Variable(jnp.zeros(()), ref=True)
    with pytest.warns(jax_mpk.MegakernelWarning, match="side effect"):
        same(megakernelize(f)(variable, X), X.sum() * X)
    same(variable[...], X.sum())


def test_flax_is_not_imported_without_a_module():
    code = ("import sys, jax.numpy as jnp, jax_mpk\n"
            "jax_mpk.megakernelize(lambda x: x * 2, implementation='cpu')(jnp.ones(3))\n"
            "assert not any(m.startswith('flax') for m in sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        y = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.25, deterministic=not train)(y)


def test_linen():
    """Mutable collections are arguments and results."""
    net = Linen()
    variables = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)

    def step(variables, x, key):
        y, new = net.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
        return y, {**variables, **new}

    a = b = variables
    for n in range(3):
        key = jax.random.key(n)
        (ya, a), (yb, b) = mk(step)(a, X + n, key), step(b, X + n, key)
        same(ya, yb)
        same(jax.tree.leaves(a), jax.tree.leaves(b))
    same(jax.jit(mk(step))(b, X, key)[0], step(b, X, key)[0])
    same(mk(lambda v, x: net.apply(v, x, train=False))(b, X), net.apply(b, X, train=False))
    bound = net.bind(b)
    same(mk(lambda x: bound(x, train=False))(X), bound(X, train=False))
