"""Contractions, reductions, scans and sorting against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mpk.frontend import cumulative
from jax_mpk.ir.expr import Load
from jax_mpk.ir.graph import Contract
from tests.unit.lowering import close, graph_of, integers, normal, run_graph, same

SPECS = ["ij,jk->ik", "ij,kj->ik", "ji,jk->ki", "bij,bjk->bik", "btkgd,bskd->bkgts", "bkgts,bskd->btkgd",
         "bskd,btkgd->bkgts", "abij,abkj->baki", "ijk,kjl->il", "i,i->", "ij,j->i", "i,j->ij", "bi,bj->bij",
         "ij,ij->ij", "abc,cd->abd", "abc,acd->abd"]  # fmt: skip
EXTENT = dict(zip("abcdgijklst", (2, 3, 4, 6, 2, 3, 5, 4, 6, 7, 1), strict=True))


def _operands(spec, dtype=jnp.float32):
    return [
        normal(tuple(EXTENT[a] for a in part), dtype, seed=n) for n, part in enumerate(spec.split("->")[0].split(","))
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_dot_general(spec):
    x, y = _operands(spec)
    same(lambda x, y: jnp.einsum(spec, x, y), x, y, sums=True)
    x, y = _operands(spec, jnp.bfloat16)
    same(lambda x, y: (jnp.einsum(spec, x, y), jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)),
         x, y, sums=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8, jnp.int16, jnp.uint32])
def test_integer_dot(dtype):
    x, y = integers((3, 5), 0, 100, dtype), integers((5, 4), 0, 120, dtype, seed=1)
    same(lambda x, y: (x @ y, lax.dot_general(x, y, (([1], [0]), ([], [])), preferred_element_type=jnp.int32)), x, y)


def test_mixed_dot():
    """einsum of positions (int32) and frequencies (float32), and bf16 with f32."""
    same(lambda p, f: jnp.einsum("bt,d->btd", p, f), integers((2, 3), 0, 50), normal((4,)))
    same(lambda p, f: jnp.einsum("bt,td->bd", p, f), integers((2, 3), 0, 50), normal((3, 4)))
    same(lambda x, y: lax.dot(x, y, preferred_element_type=jnp.float32), normal((2, 3), jnp.bfloat16), normal((3, 4)))
    same(lambda x: (x @ jnp.ones((3, 4)), jnp.full((5, 2), 0.5) @ x), normal((2, 3)))


def test_the_streamed_operand_is_rhs():
    """Arguments stream, through views and casts; between equals the larger one does."""

    def rhs(f, *args):
        g = graph_of(f, *args)
        (op,) = [op for op in g.ops if isinstance(op, Contract)]
        assert isinstance(op.rhs[0], Load) and len(op.rhs) == 1
        return g.values[op.rhs[0].value], g

    x, w = normal((2, 8)), normal((8, 4))
    assert rhs(lambda x, w: jnp.sin(x) @ w, x, w)[0].index == 1
    assert rhs(lambda x, w: w.T @ jnp.sin(x).T, x, w)[0].shape == (4, 8)
    assert rhs(lambda x, w: x @ jnp.sin(w), x, w)[0].index == 0
    assert rhs(lambda x, w: x @ w, x, w)[0].index == 1
    assert rhs(lambda x, w: jnp.sin(x) @ jnp.sin(w), x, w)[0].shape == (8, 4)
    assert rhs(lambda x, w: jnp.sin(w.T) @ jnp.sin(x.T), x, w)[0].shape == (4, 8)
    assert rhs(lambda x, w: jnp.einsum("dn,td->nt", w.astype(jnp.float32), jnp.sin(x)), x, w.astype(jnp.bfloat16))[
        0
    ].shape == (8, 4)
    cache, new = normal((2, 9, 8)), normal((2, 1, 8))

    def attend(q, c, n):
        c = lax.dynamic_update_slice(c, n, (0, 3, 0))
        return jnp.einsum("bsd,bd->bs", c, jnp.sin(q)), c

    value, g = rhs(attend, x, cache, new)
    assert value.shape == (2, 9, 8) and value.id in g.results


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
def test_reductions(data, shape):
    axes = tuple(d for d in range(len(shape)) if data.draw(st.booleans()))
    x = integers(shape, -9, 9)
    f = lambda x: (x.sum(axes), x.max(axes), x.min(axes), x.prod(axes), (x > 0).all(axes), (x > 0).any(axes))  # noqa: E731
    have = run_graph(graph_of(f, x), x)
    for a, b in zip(have, f(np.asarray(x)), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_float_reductions(dtype):
    x = normal((3, 50, 4), dtype)
    same(lambda x: (x.sum(1), x.mean(), x.var(1), x.max((0, 2)), x.std(), jnp.linalg.norm(x, axis=1)), x, ulps=32)
    same(lambda x: (jax.nn.softmax(x, 1), jax.nn.log_softmax(x, 1), jax.nn.logsumexp(x, 1)), x, ulps=32)
    same(lambda x: (jnp.argmax(x, 1), jnp.argmin(x, 0), jnp.argmax(x)), x)
    y = x.at[1, 7].set(jnp.nan)
    same(lambda x: (jnp.argmax(x, 1), jnp.argmin(x, 1), x.max(1), x.min(1), jnp.nanmax(x, 1)), y)
    same(lambda x: (jnp.argmax(jnp.round(x), 1), lax.argmax(x, 2, jnp.int8), lax.argmin(x[:, :1], 1, jnp.uint32)), x)


@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("direct", [0, 4096])
def test_cumulative(n, direct, monkeypatch):
    monkeypatch.setattr(cumulative, "DIRECT", direct)
    for dtype in (jnp.float32, jnp.int32, jnp.int8, jnp.uint16):
        x = normal((3, n, 2), scale=3.0).astype(dtype)
        same(
            lambda x: (
                jnp.cumsum(x, 1),
                jnp.cumprod(x, 1),
                lax.cummax(x, 1),
                lax.cummin(x, 1),
                lax.cumsum(x, 1, reverse=True),
                lax.cummax(x, 1, reverse=True),
                jnp.cumsum(x),
            ),
            x,
            sums=True,
        )
    same(lambda x: jnp.cumsum(x, 1), normal((3, n), jnp.bfloat16), sums=True)  # XLA sums in bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32, jnp.int8, jnp.uint8, jnp.bool_],
                         ids=lambda d: d.__name__)  # fmt: skip
def test_sorting(dtype):
    x = (normal((3, 9, 2), scale=4.0)).round()  # with ties
    x = x > 0 if dtype == jnp.bool_ else x.astype(dtype) if dtype != jnp.uint32 else (x * 1e8).astype(dtype) * 5
    same(lambda x: (jnp.sort(x, 0), jnp.sort(x, 1), jnp.argsort(x, 1), jnp.argsort(x, 2), jnp.sort(x, None)), x)
    same(lambda x: (jnp.sort(x, 1, descending=True), jnp.argsort(x, 1, descending=True)), x)
    if dtype != jnp.bool_:
        same(lambda x: (lax.top_k(jnp.swapaxes(x, 1, 2), 4), lax.top_k(x[..., 0], 9)), x)


def test_sorting_specials():
    x = jnp.array([[1.0, jnp.nan, 3.0, -jnp.inf, 3.0, -0.0, 0.0, jnp.inf, -jnp.nan]])
    close(run_graph(graph_of(jnp.sort, x), x)[0], jnp.sort(x))
    same(lambda x: (jnp.argsort(x), lax.top_k(x, 7)), x)


def test_sort_with_several_keys():
    x, y, z = (integers((4, 12), 0, 3, seed=n) for n in range(3))
    same(lambda x, y, z: lax.sort((x, y, z), num_keys=1), x, y, z)
    same(lambda x, y, z: lax.sort((x, y, z), num_keys=2), x, y, z)
    same(lambda x, y, z: lax.sort((x, y, z), num_keys=3, dimension=0), x, y, z)
    same(lambda x, y: (jnp.lexsort((x, y)), jnp.median(x.astype(jnp.float32), axis=1)), x, y)


def test_sampling_tricks():
    """Top-p and top-k masks as samplers write them."""

    def top_p(x):
        order = jnp.argsort(x, -1)[:, ::-1]
        p = jax.nn.softmax(jnp.take_along_axis(x, order, -1), -1)
        keep = jnp.cumsum(p, -1) - p < 0.7
        return jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, -1), -1), x, -jnp.inf)

    same(top_p, normal((3, 20)))
    same(lambda x: jnp.where(x < lax.top_k(x, 5)[0][:, -1:], -jnp.inf, x), normal((3, 20)))


def test_random_numbers():
    """The same bits as JAX's own generator, from a key argument of either style."""
    for key in (jax.random.key(7), jax.random.PRNGKey(3)):
        same(
            lambda k: (jax.random.bits(k, (3, 5)), jax.random.bits(k, (7,), jnp.uint8), jax.random.uniform(k, (4,))),
            key,
        )
        same(lambda k, x: jax.random.categorical(k, x, axis=-1), key, normal((4, 50)))
        same(lambda k: jax.random.uniform(jax.random.split(k, 3)[1]), key)
        same(lambda k, p: jax.random.bits(jax.random.fold_in(k, p), (5,)), key, jnp.int32(11))
        same(lambda k: jax.vmap(lambda k: jax.random.bernoulli(k, 0.3, (6,)))(jax.random.split(k, 4)), key)
        same(lambda k: (jax.random.randint(k, (9,), 0, 100), jax.random.gumbel(k, (5,))), key, ulps=64)
    same(lambda s: jax.random.uniform(jax.random.key(s), (3,)), jnp.int32(5))
