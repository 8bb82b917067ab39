"""Calls, branches, loops, in-place legality, and errors that name the primitive and the user's line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.errors import UnsupportedError
from jax_mpk.frontend import lower
from jax_mpk.ir.graph import Update
from tests.unit.lowering import graph_of, integers, normal, run_graph, same


def test_calls():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))
    inner = jax.jit(lambda x, y: (x + y, x * y))
    x = normal((3, 4))
    same(lambda x: (jax.checkpoint(jnp.sin)(x), cube(x), jax.nn.relu(x), inner(x, x + 1), jax.jit(inner)(x, x)), x)
    same(lambda x: jax.grad(lambda x: jax.checkpoint(cube)(x).sum())(x), x)


def test_branches():
    x = normal((3, 4))

    def branch(i, x):
        return lax.switch(i, [lambda x: (x, x.sum()), lambda x: (x * 2, x[0, 0]), lambda x: (-x, jnp.float32(7))], x)

    for i in (-3, 0, 1, 2, 9):
        same(branch, jnp.int32(i), x)
    for p in (True, False):
        same(lambda p, x: lax.cond(p, lambda x: x + 1, jnp.sin, x), jnp.bool_(p), x)
        same(lambda p, c, u: lax.cond(p, lambda c: c.at[1].set(u), lambda c: c, c), jnp.bool_(p), x, normal((4,)))


def test_scan():
    x, w = normal((3, 4)), normal((5, 4, 4))

    def layer(h, w):
        h = jnp.tanh(h @ w)
        return h, h.sum(0)

    for reverse in (False, True):
        same(lambda x, w: lax.scan(layer, x, w, reverse=reverse), x, w, sums=True)  # noqa: B023
    same(lambda x: lax.fori_loop(0, 4, lambda i, c: c * x[i % 3].sum() + i, jnp.float32(1)), x, sums=True)
    same(lambda x: lax.scan(lambda c, _: (c + 1, (c, x * c)), jnp.int32(0), None, length=3), x)
    same(lambda x: lax.map(lambda r: jnp.sort(r), x), x)
    same(lambda x: lax.associative_scan(jnp.add, x, axis=1), x, sums=True)


def test_scan_over_layers_with_cache():
    """Stacked weights and caches, as `nnx.scan` gives them."""

    def step(x, w, cache, pos):
        def layer(x, wc):
            w, c = wc
            c = lax.dynamic_update_slice(c, (x @ w)[:, None], (0, pos, 0))
            return x + jax.nn.softmax(jnp.einsum("bsd,bd->bs", c, x), -1) @ c[0], c

        return lax.scan(layer, x, (w, cache))

    same(step, normal((2, 4)), normal((3, 4, 4)), normal((3, 2, 6, 4)), jnp.int32(2), sums=True)


def test_constants_and_results():
    """Closed-over arrays are constants; every result is written by an operator, once."""
    table = normal((6, 3))
    same(lambda x: (y := x + 1, y, y), table)
    g = same(lambda i: (table[i], table, i, i, jnp.float32(2.5), table[i]), jnp.array([1, 4]))
    consts = [v for v in g.values.values() if v.role == "const"]
    assert [v.shape for v in consts] == [(6, 3)]
    np.testing.assert_array_equal(consts[0].data, table)
    scalar = jnp.float32(3)
    assert not [v for v in graph_of(lambda x: x * scalar, table).values.values() if v.role == "const"]


def test_dead_code_is_not_lowered():
    def f(x):
        lax.linalg.cholesky(x @ x.T)
        return x + 1

    assert len(graph_of(f, normal((3, 3))).ops) == 1


# ----------------------------------------------------------------------------------------------------------- in place


def updates(g):
    return [op for op in g.ops if isinstance(op, Update)]


def test_a_returned_cache_is_updated_in_place():
    g = same(lambda c, u: c.at[2].set(u), normal((5, 3)), normal((3,)))
    assert len(g.ops) == 1
    (op,) = updates(g)
    assert g.values[op.append.target].role == "arg" and op.append.out in g.results


def test_an_argument_that_is_not_returned_is_copied():
    g = same(lambda c, u: c.at[2].set(u).sum(), normal((5, 3)), normal((3,)))
    (op,) = updates(g)
    assert g.values[op.append.target].role == "temp"


def test_a_constant_is_copied():
    c = normal((5, 3))
    g = same(lambda u: c.at[2].set(u), normal((3,)))
    assert g.values[updates(g)[0].append.target].role == "temp"


def test_readers_of_the_old_version_move_before_the_update():
    def f(c, u):
        new = c.at[2].set(u)
        return new, c.sum(0)  # the sum comes later in the program

    g = same(f, normal((5, 3)), normal((3,)))
    assert g.values[updates(g)[0].append.target].role == "arg"
    assert g.ops[-1] is updates(g)[0]


def test_a_reader_that_needs_both_versions_forces_a_copy():
    def f(c, u):
        new = c.at[2].set(u)
        return new, new - c

    g = same(f, normal((5, 3)), normal((3,)))
    assert g.values[updates(g)[0].append.target].role == "temp"


def test_two_updates_of_one_value():
    g = same(lambda c, u: (c.at[2].set(u), c.at[3].set(u)), normal((5, 3)), normal((3,)))
    assert sorted(g.values[op.append.target].role for op in updates(g)) == ["arg", "temp"]
    same(lambda c, u: c.at[2].set(u) + c.at[3].set(u), normal((5, 3)), normal((3,)))


def test_chains_and_swaps():
    def swap(a, b, u):
        return b.at[1].set(u), a.at[0].set(u).at[3].set(2 * u)

    g = same(swap, normal((5, 3)), normal((5, 3), seed=1), normal((3,)))
    assert all(g.values[op.append.target].role == "arg" or op.append.target in {o.append.out for o in updates(g)}
               for op in updates(g))  # fmt: skip
    same(lambda c, u: (x := c.at[1].set(u), x.at[2].set(u)), normal((5, 3)), normal((3,)))
    same(lambda c: c.at[1:3].set(c[:2]), normal((5, 3)))
    same(lambda c: lax.dynamic_update_slice(c, c, (0, 0)), normal((5, 3)))
    same(lambda c: lax.dynamic_update_slice(c, c.astype(int), (c[0, 0], 0)), integers((5, 3), 0, 9))


def test_random_programs_of_updates():
    """Random sequences of updates and reads of a few versions: order and copies must keep the meaning."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        steps = [(int(rng.integers(4)), *map(int, rng.integers(0, 100, 3))) for _ in range(8)]
        keep = [int(n) for n in rng.integers(0, 100, 2)]

        def f(c, u, steps=steps, keep=keep):
            versions, sums = [c], []
            for kind, n, row, _ in steps:
                v = versions[n % len(versions)]
                if kind < 2:
                    versions.append(v.at[row % 4].set(u + len(versions)))
                elif kind == 2:
                    sums.append(v.sum(0))
                else:
                    u = u + v[row % 4]
            return [versions[k % len(versions)] for k in keep], sums, u

        c, u = integers((4, 2), 0, 9), integers((2,), 0, 9)
        have = run_graph(graph_of(f, c, u), c, u)
        for x, y in zip(have, jax.tree.leaves(f(c, u)), strict=True):
            np.testing.assert_array_equal(x, np.asarray(y))


# ------------------------------------------------------------------------------------------------------------- errors


def here(offset=0):
    frame = inspect.currentframe().f_back
    return f"{__file__}:{frame.f_lineno + offset} "


def failure(f, *args):
    with pytest.raises(UnsupportedError) as info:
        lower(jax.make_jaxpr(f)(*args))
    return info.value


def test_an_unknown_primitive_is_named_with_its_line():
    def f(x):
        return jnp.linalg.cholesky(x @ x.T) + 1, here()

    e = failure(lambda x: f(x)[0], normal((3, 3)))
    assert e.primitive == "cholesky" and "float32[3,3]" in e.shapes
    assert e.where.startswith(f(normal((3, 3)))[1]) and "test_an_unknown_primitive" in e.where
    assert str(e).startswith("cholesky(") and e.where in str(e)


def test_the_line_is_the_callers_for_library_functions():
    """Traces of library functions are cached: the line inside is that of the first call."""
    x = normal((4, 4))
    jax.make_jaxpr(lambda x: jnp.linalg.svd(x))(x)

    def f(x):
        return jnp.linalg.svd(x), here()

    assert failure(lambda x: f(x)[0], x).where.startswith(f(x)[1])


@pytest.mark.parametrize("f, args, primitive", [
    (lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c * 2, x), [normal((3,))], "while"),
    (lambda x: x.astype(jnp.complex64), [normal((3,))], "convert_element_type"),
    (lambda x: x.astype(jnp.float8_e4m3fn), [normal((3,))], "convert_element_type"),
    (lambda x: jnp.fft.rfft(x).real, [normal((8,))], "fft"),
    (lambda x: lax.igamma(x, x), [normal((3,))], "igamma"),
    (lambda x: jnp.linalg.cholesky(x @ x.T), [normal((3, 3))], "cholesky"),
    (lambda x: lax.fori_loop(0, 100_000, lambda i, c: c + 1, x), [normal((3,))], "scan"),
    (lambda x: jax.pure_callback(np.sin, x, x), [normal((3,))], "pure_callback"),
], ids=lambda p: p if isinstance(p, str) else "")  # fmt: skip
def test_unsupported(f, args, primitive):
    e = failure(f, *args)
    assert e.primitive == primitive and __file__ in e.where and e.reason and e.shapes
    assert "site-packages" not in e.where


def test_side_effects_and_strange_arguments():
    def f(x):
        jax.debug.print("{}", x)
        return x

    e = failure(f, normal((3,)))
    assert e.primitive == "debug_print" or "debug" in e.primitive
    assert "side effects" in e.reason and __file__ in e.where
    assert "float8" in failure(lambda x: x, jnp.zeros((2,), jnp.float8_e4m3fn)).reason
    assert "no elements" in failure(lambda x: x, jnp.zeros((0, 2))).reason
    assert "complex64" in failure(lambda x: x, jnp.zeros((2,), jnp.complex64)).reason


def test_sources_are_the_users():
    def f(x):
        y = jax.nn.silu(x)
        return jnp.where(y > 0, y, 0), here(-1)

    g = graph_of(lambda x: f(x)[0], normal((3,)))
    lines = {op.source.where.rsplit(" (", 1)[0] for op in g.ops}
    first = f(normal((3,)))[1].strip()
    assert first in lines and all(w.startswith(__file__) for w in lines)
    assert all(op.source.primitive for op in g.ops)
