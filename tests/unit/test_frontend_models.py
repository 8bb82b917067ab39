"""Whole models and their parts, in the spellings that public code uses, against `jax.jit`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from models import decode, registry
from tests.unit.lowering import graph_of, integers, normal, run_graph, same


def tokens_agree(have, want):
    np.testing.assert_array_equal(have, np.asarray(want))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["qwen3-tiny", "llama-tiny"])
@pytest.mark.parametrize("batch", [1, 3])
def test_zoo_decode_step(name, dtype, batch):
    model, config = registry.load(name, dtype=dtype)
    graphdef, state = nnx.split(model)
    cache = jax.tree.map(lambda x: normal(x.shape, x.dtype), model.init_cache(batch, 24))
    args = (state, integers((batch,), 0, config.vocab_size), cache, jnp.int32(7))
    step = functools.partial(decode.decode_step, graphdef)
    g = graph_of(step, *args)
    have, want = run_graph(g, *args), jax.tree.leaves(jax.jit(step)(*args))
    for x, y in zip(have, want, strict=True):
        y = np.asarray(y).astype(np.float64)
        tol = 1e-5 if dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=tol, atol=tol * np.abs(y).max())
    in_place = {new for op in g.ops for _, new in op.inplace()}
    assert len(in_place) == 2 * config.num_layers == len(in_place & set(g.results))


def test_zoo_prefill_and_sampling():
    model, config = registry.load("qwen3-tiny", dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    cache = model.init_cache(2, 16)
    tokens = integers((2, 5), 0, config.vocab_size)
    prefill = functools.partial(decode.prefill, graphdef)
    same(prefill, state, tokens, cache, jnp.int32(3), jnp.int32(4), ulps=64, sums=True)
    step = functools.partial(decode.sample_step, graphdef)
    args = (state, tokens[:, 0], cache, jnp.int32(0), jax.random.key(1), jnp.float32(0.8))
    have = run_graph(graph_of(step, *args), *args)
    tokens_agree(have[0], jax.jit(step)(*args)[0])


class OwnDecoder(nnx.Module):
    """A Qwen3-like layer written another way: repeats instead of groups, scatter for the cache, argmax at the end."""

    def __init__(self, rngs, d=24, heads=4, kv=2, dh=10, vocab=50):
        self.heads, self.kv, self.dh = heads, kv, dh
        self.embed = nnx.Embed(vocab, d, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(d, rngs=rngs), nnx.LayerNorm(d, rngs=rngs)
        self.qkv = nnx.Linear(d, (heads + 2 * kv) * dh, rngs=rngs)
        self.qnorm = nnx.RMSNorm(dh, rngs=rngs)
        self.out = nnx.LinearGeneral((heads, dh), d, axis=(-2, -1), rngs=rngs)
        self.gate, self.up = (nnx.Linear(d, 40, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(40, d, use_bias=False, rngs=rngs)

    def __call__(self, token, k_cache, v_cache, pos):
        x = self.embed(token)
        q, k, v = jnp.split(self.qkv(self.norm1(x)), [self.heads * self.dh, (self.heads + self.kv) * self.dh], -1)
        q = self.qnorm(q.reshape(-1, self.heads, self.dh))
        k, v = k.reshape(-1, self.kv, self.dh), v.reshape(-1, self.kv, self.dh)
        q, k = rope_interleaved(q, pos), rope_interleaved(k, pos)
        rows = jnp.arange(x.shape[0])
        k_cache, v_cache = k_cache.at[rows, pos].set(k), v_cache.at[rows, pos].set(v)
        kk, vv = (jnp.repeat(c, self.heads // self.kv, axis=2) for c in (k_cache, v_cache))
        s = jnp.einsum("bhd,bshd->bhs", q, kk) / np.sqrt(self.dh)
        s = jnp.where(jnp.arange(s.shape[-1])[None, None] <= pos[:, None, None], s, -jnp.inf)
        x = x + self.out(jnp.einsum("bhs,bshd->bhd", jax.nn.softmax(s), vv))
        h = self.norm2(x)
        x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
        return jnp.argmax(self.embed.attend(x), -1), x, k_cache, v_cache


def rope_interleaved(x, pos):
    freq = 100.0 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = (pos[:, None] * freq)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    out = jnp.stack([even * jnp.cos(angle) - odd * jnp.sin(angle), odd * jnp.cos(angle) + even * jnp.sin(angle)], -1)
    return out.reshape(x.shape)


def test_own_decode_step():
    """Ragged positions: every row writes and attends at its own."""
    model = OwnDecoder(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    f = lambda state, *a: nnx.merge(graphdef, state)(*a)  # noqa: E731
    caches = [normal((3, 9, 2, 10), seed=n) for n in range(2)]
    same(f, state, jnp.array([1, 7, 30]), *caches, jnp.array([0, 4, 8]), ulps=64, sums=True)
    same(lambda model, *a: model(*a), model, jnp.array([1, 7, 30]), *caches, jnp.array([2, 3, 4]), ulps=64, sums=True)


def _in_f32(x, w):
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * w).astype(x.dtype)


RMSNORM = {
    "rsqrt of mean": lambda x, w: x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w,
    "divided by sqrt": lambda x, w: x / jnp.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + 1e-6) * (1 + w),
    "in float32": _in_f32,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", RMSNORM)
def test_rmsnorm(name, dtype):
    same(RMSNORM[name], normal((3, 33), dtype), normal((33,), dtype, seed=1), ulps=16 if dtype == jnp.float32 else 3)


def _angles(pos, n):
    return pos[..., None] * (1e4 ** (-jnp.arange(n) / n)).astype(jnp.float32)


def rope_halves(x, pos):
    c, s = jnp.cos(_angles(pos, 4))[:, None], jnp.sin(_angles(pos, 4))[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def rope_rotate_half(x, pos):
    angle = jnp.tile(_angles(pos, 4), (1, 2))[:, None]
    rotated = jnp.concatenate([-x[..., 4:], x[..., :4]], -1)
    return x * jnp.cos(angle) + rotated * jnp.sin(angle)


def rope_table(x, pos):
    table = jnp.stack([jnp.cos(_angles(jnp.arange(32), 4)), jnp.sin(_angles(jnp.arange(32), 4))], -1)
    c, s = table[pos][:, None, :, 0], table[pos][:, None, :, 1]
    y = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.stack([y[..., 0] * c - y[..., 1] * s, y[..., 1] * c + y[..., 0] * s], -1).reshape(x.shape)


@pytest.mark.parametrize("f", [rope_halves, rope_rotate_half, rope_table], ids=lambda f: f.__name__)
def test_rope(f):
    same(f, normal((3, 2, 8)), jnp.array([0, 5, 30]), ulps=64, sums=True)


CACHE = {
    "dynamic_update_slice": lambda c, u, p: lax.dynamic_update_slice(c, u, (0, p[0], 0, 0)),
    "scatter": lambda c, u, p: c.at[jnp.arange(2), p].set(u[:, 0]),
    "vmapped": lambda c, u, p: jax.vmap(lambda c, u, p: lax.dynamic_update_slice(c, u, (p, 0, 0)))(c, u, p),
    "column": lambda c, u, p: c.at[:, p[0]].set(u[:, 0]),
}


@pytest.mark.parametrize("name", CACHE)
def test_cache_update(name):
    """In place, without a copy, in every spelling."""
    args = (normal((2, 6, 2, 4), jnp.bfloat16), normal((2, 1, 2, 4), jnp.bfloat16, seed=1), jnp.array([3, 1]))
    g = same(CACHE[name], *args, ulps=0)
    ((old, new),) = [pair for op in g.ops for pair in op.inplace()]
    assert g.values[old].role == "arg" and g.results == (new,)


def test_layernorm_mlp():
    model = nnx.Sequential(nnx.LayerNorm(7, rngs=nnx.Rngs(0)), nnx.Linear(7, 13, rngs=nnx.Rngs(1)), jax.nn.gelu,
                           nnx.Linear(13, 5, rngs=nnx.Rngs(2)), jax.nn.log_softmax)  # fmt: skip
    same(lambda m, x: m(x), model, normal((3, 7)), ulps=64, sums=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_attention_of_odd_sizes_with_a_random_mask(dtype):
    q, k, v = normal((2, 5, 6, 11), dtype), normal((2, 7, 3, 11), dtype, seed=1), normal((2, 7, 3, 11), dtype, seed=2)
    mask = normal((2, 1, 5, 7), seed=3) > -0.5
    same(lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m), q, k, v, mask, sums=True)
    same(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3), q, k, v, sums=True)
    bias = normal((2, 6, 5, 7), seed=4)

    def soft_cap(q, k, v, b):
        s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, 5, 3, 2, 11), k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.tanh(s / 5) * 5 + b.reshape(2, 3, 2, 5, 7))
        return jnp.einsum("bkgts,bskh->btkgh", p.astype(v.dtype), v).reshape(q.shape)

    same(soft_cap, q, k, v, bias, sums=True, ulps=16)


def test_mixture_of_experts_over_all_experts():
    def moe(x, router, up, down):
        weight, chosen = lax.top_k(jax.nn.softmax(x @ router), 2)
        gates = (jax.nn.one_hot(chosen, 4) * weight[..., None]).sum(1)
        return jnp.einsum("tef,efd,te->td", jax.nn.silu(jnp.einsum("td,edf->tef", x, up)), down, gates)

    same(moe, normal((5, 6)), normal((6, 4), seed=1), normal((4, 6, 8), seed=2), normal((4, 8, 6), seed=3), ulps=64,
         sums=True)  # fmt: skip


def test_linen_style_scan_over_layers():
    def model(x, ws, scales):
        def layer(x, p):
            w, s = p
            return x + jnp.tanh(RMSNORM["rsqrt of mean"](x, s) @ w), None

        return lax.scan(layer, x, (ws, scales))[0]

    same(model, normal((2, 6)), normal((4, 6, 6)), normal((4, 6)), ulps=32, sums=True)
