"""Index maps, gathers, scatters and slices against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mpk.frontend.shape import common_groups
from jax_mpk.ir.graph import Map
from tests.unit.lowering import graph_of, integers, normal, run_graph, same


def counting(shape, dtype=jnp.int32):
    return jnp.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)


def check(f, *args):
    """Against NumPy-speed eager evaluation: hypothesis makes many shapes, compiling each would take long."""
    have = run_graph(graph_of(f, *args), *args)
    for x, y in zip(have, jax.tree.leaves(f(*args)), strict=True):
        np.testing.assert_array_equal(x, np.asarray(y))


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def factored(draw):
    """Two shapes of one size, from one multiset of primes cut in different ways."""
    primes = draw(st.lists(st.sampled_from([2, 3, 5, 1]), min_size=1, max_size=5))
    out = []
    for _ in range(2):
        order, shape, n = draw(st.permutations(primes)), [], 1
        for p in order:
            n *= p
            if draw(st.booleans()):
                shape.append(n)
                n = 1
        out.append(tuple([*shape, n]))
    return out


@settings(max_examples=120, deadline=None)
@given(factored())
def test_reshape(pair):
    old, new = pair
    x = counting(old)
    np.testing.assert_array_equal(
        run_graph(graph_of(lambda x: x.reshape(new) + 1, x), x)[0], np.asarray(x).reshape(new) + 1
    )


def test_reshape_that_does_not_split():
    """(2, 3) to (3, 2) has no quasi-affine coordinates over its result: the loop is the flattened group."""
    x = counting((4, 2, 3, 5))
    g = graph_of(lambda x: x.reshape(4, 3, 2, 5), x)
    assert [op.domain for op in g.ops] == [(4, 6, 5)] and g.ops[0].store is not None
    check(lambda x: x.reshape(4, 3, 2, 5), x)
    assert common_groups((2, 3, 4), (6, 2, 2)) == (6, 4)
    assert common_groups((1,), (1, 1)) == ()


def against(f, want, *args):
    """Against NumPy: hypothesis makes many shapes, and compiling each would take long."""
    have = run_graph(graph_of(f, *args), *args)
    for x, y in zip(have, want(*map(np.asarray, args)), strict=True):
        np.testing.assert_array_equal(x, y)


@settings(max_examples=60, deadline=None)
@given(st.data(), shapes)
def test_index_maps(data, shape):
    x = counting(shape)
    order = data.draw(st.permutations(range(len(shape))))
    dims = [d for d in range(len(shape)) if data.draw(st.booleans())]
    against(lambda x: (x.transpose(order), lax.rev(x, dims), lax.expand_dims(x, [0]), x.squeeze() + 1),
            lambda x: (x.transpose(order), np.flip(x, dims), x[None], x.squeeze() + 1), x)  # fmt: skip
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    stops = [data.draw(st.integers(s + 1, n)) for s, n in zip(starts, shape, strict=True)]
    steps = [data.draw(st.integers(1, 3)) for _ in shape]
    where = tuple(slice(a, b, k) for a, b, k in zip(starts, stops, steps, strict=True))
    against(lambda x: [lax.slice(x, starts, stops, steps)], lambda x: [x[where]], x)
    reps = [data.draw(st.integers(1, 3)) for _ in shape]
    against(lambda x: (jnp.tile(x, reps), jnp.broadcast_to(x, (3, *shape))),
            lambda x: (np.tile(x, reps), np.broadcast_to(x, (3, *shape))), x)  # fmt: skip
    if shape:
        axis = data.draw(st.integers(0, len(shape) - 1))
        at = [starts[axis]] if starts[axis] else []
        against(lambda x: (jnp.concatenate([x, x * 2, x], axis), jnp.stack([x, x + 1], axis),
                           *jnp.split(x, at, axis), jnp.roll(x, 1, axis)),
                lambda x: (np.concatenate([x, x * 2, x], axis), np.stack([x, x + 1], axis),
                           *np.split(x, at, axis), np.roll(x, 1, axis)), x)  # fmt: skip


def test_arrays_without_elements():
    """They may be joined to others, and drop out."""
    x = counting((2, 3))
    same(lambda x: (jnp.concatenate([x, x[:0], x]), jnp.split(x, [0], 1)[1]), x)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_pad(data, shape):
    config = [
        (data.draw(st.integers(-2, 3)), data.draw(st.integers(-2, 3)), data.draw(st.integers(0, 2))) for _ in shape
    ]
    sizes = [max(n + (n - 1) * i + lo + hi, 0) for n, (lo, hi, i) in zip(shape, config, strict=True)]
    if min(sizes) > 0:
        check(lambda x: lax.pad(x, jnp.int32(-7), config), counting(shape))


def test_odd_spellings():
    x = normal((2, 3, 4))
    same(lambda x: (x[:, ::2, ::-1], x[..., 1], x[:, None], jnp.moveaxis(x, 0, 2), x.T, x.ravel()), x)
    same(lambda x: [*x], x)
    same(lambda x: (jnp.repeat(x, 3, axis=1), jnp.tril(x[0]), jnp.triu(x[1], 1)), x)
    same(lambda x: jnp.einsum("ijk->kij", x), x)
    same(lambda x: (jnp.arange(5) * 2, jnp.eye(3), jnp.zeros((2, 2)), jnp.linspace(0, 1, 7), x[0, 0, 0]), x)
    same(lambda x: lax.optimization_barrier((x + 1, x * 2)), x)
    same(lambda x: (lax.stop_gradient(x), jnp.copy(x), x, x), x)
    same(lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 4), x)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_dynamic_slice(data, shape):
    """Starts beyond either end move the window inside."""
    sizes = [data.draw(st.integers(1, n)) for n in shape]
    starts = [jnp.int32(data.draw(st.integers(-8, 8))) for _ in shape]
    x = counting(shape)
    check(lambda x, *s: lax.dynamic_slice(x, s, sizes), x, *starts)
    u = -counting(tuple(sizes)) - 1
    check(lambda x, u, *s: lax.dynamic_update_slice(x, u, s), x, u, *starts)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32, jnp.int16])
def test_index_dtypes(dtype):
    x = counting((100, 3))
    i = jnp.array([0, 3, 99, 120], dtype)
    check(lambda x, i: x.at[i].get(mode="fill", fill_value=-5), x, i)
    check(lambda x, i: lax.dynamic_slice(x, (i, jnp.zeros((), dtype)), (2, 3)), x, jnp.asarray(120, dtype))


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_gather(mode):
    x, i = normal((5, 4)), jnp.array([[0, 4, -1], [2, 3, -5]])
    outside = jnp.array([[0, 5, -6], [7, 3, -50]])
    tests = [i] if mode == "promise_in_bounds" else [i, outside]
    for i in tests:
        same(lambda x, i: jnp.take(x, i, axis=0, mode=None if mode == "promise_in_bounds" else mode), x, i)
        same(lambda x, i: x.at[i].get(mode=mode), x, i)
        same(lambda x, i: x.at[:, i % 4].get(mode=mode), x, i)
        same(lambda x, i: x.at[i, i % 4].get(mode=mode), x, i)
        same(lambda x, i: x.T.at[1, i].get(mode=mode), x, i)
    same(lambda x, i: jnp.take_along_axis(x, i, axis=1), x, integers((5, 2), 0, 4))
    same(lambda x, i: jax.vmap(lambda r, j: r[j])(x, i), x, integers((5, 2), 0, 4))
    same(lambda x, i: x.astype(jnp.int8).at[i].get(mode="fill"), x, outside)
    same(lambda x, i: (x > 0).at[i].get(mode="fill"), x, outside)
    same(lambda x, i: x.astype(jnp.bfloat16)[i], x, tests[0])
    same(lambda x, i: x[i], x, jnp.int32(3))


def test_gather_of_windows():
    x, i = normal((6, 5)), jnp.array([0, 3, 5, -2])
    dims = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,))
    for mode in ("clip", "fill"):
        same(lambda x, i: lax.gather(x, i[:, None], dims, (2, 3), mode=mode), x, i)  # noqa: B023
    same(lambda x, i: jax.vmap(lambda s: lax.dynamic_slice(x, (s, s), (2, 2)))(i), x, i)


UPDATES = {
    "row": lambda c, p, u: c.at[p[0]].set(u[0]),
    "rows": lambda c, p, u: c.at[p].set(u[:, None]),
    "column": lambda c, p, u: c.at[:, p[0]].set(u),
    "batched": lambda c, p, u: c.at[jnp.arange(4), p].set(u),
    "batched add": lambda c, p, u: c.at[jnp.arange(4), p].add(u),
    "add with duplicates": lambda c, p, u: c.at[0, p * 0 + 2].add(u),
    "vmapped": lambda c, p, u: jax.vmap(lambda c, p, u: lax.dynamic_update_slice(c, u[None], (p, 0)))(c, p, u),
    "vmapped window": lambda c, p, u: jax.vmap(
        lambda c, p, u: lax.dynamic_update_slice(c, jnp.stack([u, u]), (p, 0)))(c, p, u),
    "slice": lambda c, p, u: c.at[:, 2].set(u),
    "static": lambda c, p, u: c.at[:, 1:3].set(u[:, None]).at[0, 0, 0].set(7),
    "scalar": lambda c, p, u: c.at[p[0], p[1], p[2]].set(9),
    "drop": lambda c, p, u: c.at[:, p[0] + 20].set(u).at[jnp.arange(4), p + 3].set(u, mode="drop"),
    "clip": lambda c, p, u: c.at[jnp.arange(4), p + 3].set(u, mode="clip"),
    "mask": lambda c, p, u: jnp.where(jnp.arange(5)[None, :, None] == p[:, None, None], u[:, None], c),
    "one hot": lambda c, p, u: c * (1 - jax.nn.one_hot(p, 5)[..., None]) + jax.nn.one_hot(p, 5)[..., None] * u[:, None],
}  # fmt: skip


@pytest.mark.parametrize("name", UPDATES)
def test_updates(name):
    for p in jnp.array([2, 0, 1, 3]), jnp.array([4, -1, 0, -2]):
        same(UPDATES[name], normal((4, 5, 3)), p, normal((4, 3), seed=1))
    same(UPDATES[name], normal((4, 5, 3), jnp.bfloat16), p, normal((4, 3), jnp.bfloat16, seed=1), ulps=1, eager=True)


def test_window_that_sticks_out_is_dropped_whole():
    dims = lax.ScatterDimensionNumbers(update_window_dims=(1,), inserted_window_dims=(),
                                       scatter_dims_to_operand_dims=(0,))  # fmt: skip
    for mode in ("fill", "clip"):
        same(lambda x, i, u: lax.scatter(x, i, u, dims, mode=mode),  # noqa: B023
             normal((6,)), jnp.array([[4], [-1]]), normal((2, 3)))  # fmt: skip


def test_splats_make_no_operators():
    g = graph_of(lambda x: x * jnp.full((3, 4), 2.0).reshape(4, 3).T, counting((3, 4), jnp.float32))
    assert len(g.ops) == 1 and isinstance(g.ops[0], Map)
