"""One decoder, spelled in many ways: what public Flax code does for the same mathematics.

Plain functions over a dictionary of weights, so that a test can combine any spelling of each part. Shapes: tokens
[B], cache k and v [B, S, Hkv, D] per layer, pos scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Shape:
    """A tiny decoder."""

    layers: int = 2
    width: int = 48
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    hidden: int = 80
    vocab: int = 96
    slots: int = 24
    qk_norm: bool = False


# ------------------------------------------------------------------------------------------------------------- RMSNorm


def norm_rsqrt(x, scale):
    h = x.astype(jnp.float32)
    h = h * lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)
    return (h * scale).astype(x.dtype)


def norm_divide(x, scale):
    h = x.astype(jnp.float32)
    return (scale * (h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6))).astype(x.dtype)


def norm_zero_mean(x, scale):
    """As flax.nnx.RMSNorm has it: the code of LayerNorm with a mean of zero."""
    h = x.astype(jnp.float32)
    mean = jnp.zeros(h.shape[:-1] + (1,), jnp.float32)
    power = jnp.mean(lax.square(h), axis=-1)
    return ((h - mean) * (lax.rsqrt(power + 1e-6)[..., None] * scale)).astype(x.dtype)


NORMS = {"rsqrt": norm_rsqrt, "divide": norm_divide, "zero_mean": norm_zero_mean}


# ---------------------------------------------------------------------------------------------------------------- RoPE


def _angles(pos, length, dim):
    freq = 10000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return (pos + jnp.arange(length)).astype(jnp.float32)[:, None] * freq


def rope_split(x, pos):
    angle = _angles(pos, x.shape[1], x.shape[-1])[None, :, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rope_rotate_half(x, pos):
    angle = _angles(pos, x.shape[1], x.shape[-1])
    angle = jnp.concatenate([angle, angle], axis=-1)[None, :, None, :]
    half = x.shape[-1] // 2
    rotated = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    h = x.astype(jnp.float32) * jnp.cos(angle) + rotated.astype(jnp.float32) * jnp.sin(angle)
    return h.astype(x.dtype)


def rope_interleaved(x, pos):
    angle = _angles(pos, x.shape[1], x.shape[-1])[None, :, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    h = x.astype(jnp.float32)
    a, b = h[..., 0::2], h[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def rope_table(x, pos):
    """Rows of a table made for all positions."""
    dim = x.shape[-1]
    freq = 10000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    table = jnp.arange(64, dtype=jnp.float32)[:, None] * freq
    rows = lax.dynamic_slice(table, (pos, 0), (x.shape[1], dim // 2))[None, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(rows), jnp.cos(rows)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


ROPES = {"split": rope_split, "rotate_half": rope_rotate_half, "interleaved": rope_interleaved, "table": rope_table}


# -------------------------------------------------------------------------------------------------------- cache updates


def update_slice(cache, new, pos):
    return lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, pos, 0, 0))


def update_scatter(cache, new, pos):
    return cache.at[:, pos].set(new[:, 0].astype(cache.dtype))


def update_scatter_rows(cache, new, pos):
    rows = jnp.arange(cache.shape[0])
    return cache.at[rows, jnp.full(cache.shape[0], pos)].set(new[:, 0].astype(cache.dtype))


def update_vmapped(cache, new, pos):
    one = jax.vmap(lambda c, n, p: lax.dynamic_update_slice(c, n, (p, 0, 0)))
    return one(cache, new.astype(cache.dtype), jnp.full(cache.shape[0], pos))


def update_where(cache, new, pos):
    here = (jnp.arange(cache.shape[1]) == pos)[None, :, None, None]
    return jnp.where(here, new.astype(cache.dtype), cache)


UPDATES = {"slice": update_slice, "scatter": update_scatter, "scatter_rows": update_scatter_rows,
           "vmapped": update_vmapped, "where": update_where}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ attention


def attend_grouped(q, k, v, pos):
    b, t, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, d)
    s = jnp.einsum("btgnd,bsgd->bgnts", q, k, preferred_element_type=jnp.float32) * d**-0.5
    s = jnp.where(jnp.arange(k.shape[1]) <= pos, s, -1e30)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    return jnp.einsum("bgnts,bsgd->btgnd", p, v).reshape(b, t, h, d)


def attend_cache_left(q, k, v, pos):
    """The cache on the left of both contractions, the scale on the queries, the mask as a bias."""
    b, t, h, d = q.shape
    g = k.shape[2]
    q = (q * d**-0.5).reshape(b, t, g, h // g, d)
    s = jnp.einsum("bsgd,btgnd->bsgnt", k, q, preferred_element_type=jnp.float32)
    bias = jnp.where(jnp.arange(k.shape[1]) <= pos, 0.0, -1e30)[None, :, None, None, None]
    p = jax.nn.softmax(s + bias, axis=1).astype(v.dtype)
    return jnp.einsum("bsgd,bsgnt->btgnd", v, p).reshape(b, t, h, d)


def attend_repeat(q, k, v, pos):
    """Keys repeated for every query head, a hand-written softmax, a soft cap."""
    h, d = q.shape[2:]
    k, v = (jnp.repeat(x, h // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(jnp.float32(d))
    s = 30.0 * jnp.tanh(s / 30.0)
    s = jnp.where(jnp.arange(k.shape[1])[None, None, None, :] > pos, -1e30, s)
    e = jnp.exp(s - lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True)))
    p = (e / jnp.sum(e, axis=-1, keepdims=True)).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", p, v)


ATTENTIONS = {"grouped": attend_grouped, "cache_left": attend_cache_left, "repeat": attend_repeat}


# ------------------------------------------------------------------------------------------------- weights and caches


Draw = Callable[..., jax.Array]
"""`draw(*dims)`: normal random numbers of standard deviation one, in float32."""


def on_host(seed: int) -> Draw:
    rng = np.random.default_rng(seed)
    return lambda *dims: jnp.asarray(rng.normal(size=dims), jnp.float32)


def on_device(seed: int) -> Draw:
    """For large models: drawn where they stay."""
    keys = iter(range(1 << 30))
    make = jax.jit(lambda key, dims: jax.random.normal(key, dims, jnp.bfloat16), static_argnums=1)
    return lambda *dims: make(jax.random.fold_in(jax.random.key(seed), next(keys)), dims)


def weights(shape: Shape, dtype, draw: Draw | None = None, fused: bool = False, transposed: bool = False,
            stacked: bool = False):  # fmt: skip
    """Random weights, scaled so that activations keep their size.

    fused: Q, K, V in one matrix, gate and up in one. transposed: matrices are [N, K]. stacked: one array [L, ...] for all
    layers. The values do not depend on how they are kept.
    """
    s, draw = shape, draw or on_host(0)

    def matrix(*dims):
        return (draw(*dims) / np.sqrt(dims[-2])).astype(dtype)

    def vector(n):
        return 1 + 0.1 * draw(n).astype(jnp.float32)

    def kept(*parts):
        w = jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]
        return w.T if transposed else w

    def layer():
        out = dict(n1=vector(s.width), n2=vector(s.width), nq=vector(s.head), nk=vector(s.head))
        q = matrix(s.width, s.heads * s.head)
        k, v = (matrix(s.width, s.kv_heads * s.head) for _ in "kv")
        o, gate, up = matrix(s.heads * s.head, s.width), matrix(s.width, s.hidden), matrix(s.width, s.hidden)
        out |= dict(o=kept(o), down=kept(matrix(s.hidden, s.width)))
        if fused:
            return out | dict(qkv=kept(q, k, v), gu=kept(gate, up))
        return out | dict(q=kept(q), k=kept(k), v=kept(v), gate=kept(gate), up=kept(up))

    embed = draw(s.vocab, s.width).astype(dtype)
    layers = [layer() for _ in range(s.layers)]
    if stacked:
        layers = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return dict(embed=embed, norm=vector(s.width), layers=layers)


def cache(shape: Shape, batch: int, dtype, draw: Draw | None = None, stacked: bool = False, heads_first: bool = False):
    """Caches that already hold something everywhere: [B, S, H, D] or [B, H, S, D], a layer or one array [L, ...]."""
    draw = draw or on_host(1)

    def made():
        x = draw(batch, shape.slots, shape.kv_heads, shape.head)
        return (x.transpose(0, 2, 1, 3) if heads_first else x).astype(dtype)

    layers = [dict(k=made(), v=made()) for _ in range(shape.layers)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers) if stacked else layers


# -------------------------------------------------------------------------------------------------------------- decoder


def decoder(shape: Shape, norm="rsqrt", rope="split", update="slice", attend="grouped", fused=False, transposed=False,
            stacked=False, cache_stacked=False, heads_first=False):  # fmt: skip
    """`step(weights, tokens[B], cache, pos) -> (next[B], logits[B, V], cache)` in the chosen spellings; the last five are
    those of `weights` and `cache`."""
    norm, rope, update, attend = NORMS[norm], ROPES[rope], UPDATES[update], ATTENTIONS[attend]
    s = shape

    def times(x, w):
        return jnp.einsum("...k,nk->...n", x, w) if transposed else x @ w

    def keep(caches, layer, name, new, pos):
        """The caches with `new` [B, 1, H, D] at `pos` of a layer, and that layer as [B, S, H, D]."""
        if cache_stacked:
            whole = caches[name]
            if heads_first:
                whole = whole.at[layer, :, :, pos].set(new[:, 0].astype(whole.dtype))
                return caches | {name: whole}, whole[layer].transpose(0, 2, 1, 3)
            start = (layer, 0, pos, 0, 0)
            whole = lax.dynamic_update_slice(whole, new.astype(whole.dtype)[None], start)
            return caches | {name: whole}, whole[layer]
        old = caches[layer][name]
        if heads_first:
            one = lax.dynamic_update_slice(old, new.transpose(0, 2, 1, 3).astype(old.dtype), (0, 0, pos, 0))
            seen = one.transpose(0, 2, 1, 3)
        else:
            one = seen = update(old, new, pos)
        return [c | {name: one} if n == layer else c for n, c in enumerate(caches)], seen

    def step(w, tokens, caches, pos):
        b = tokens.shape[0]
        x = w["embed"][tokens][:, None, :]
        for n in range(s.layers):
            p = jax.tree.map(lambda a, n=n: a[n], w["layers"]) if stacked else w["layers"][n]
            h = norm(x, p["n1"])
            if fused:
                cuts = [s.heads * s.head, (s.heads + s.kv_heads) * s.head]
                q, k, v = (y.reshape(b, 1, -1, s.head) for y in jnp.split(times(h, p["qkv"]), cuts, -1))
            else:
                q, k, v = (times(h, p[n]).reshape(b, 1, -1, s.head) for n in "qkv")
            if s.qk_norm:
                q, k = norm(q, p["nq"]), norm(k, p["nk"])
            q, k = rope(q, pos), rope(k, pos)
            caches, keys = keep(caches, n, "k", k, pos)
            caches, values = keep(caches, n, "v", v, pos)
            x = x + times(attend(q, keys, values, pos).reshape(b, 1, -1), p["o"])
            h = norm(x, p["n2"])
            if fused:
                gate, up = jnp.split(times(h, p["gu"]), 2, -1)
            else:
                gate, up = times(h, p["gate"]), times(h, p["up"])
            x = x + times(jax.nn.silu(gate) * up, p["down"])
        logits = (norm(x, w["norm"]) @ w["embed"].T).astype(jnp.float32)[:, 0]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, caches

    return step


LAYOUTS = dict(
    plain={}, fused=dict(fused=True), transposed=dict(transposed=True), stacked=dict(stacked=True),
    heads_first=dict(heads_first=True), one_cache=dict(cache_stacked=True),
    all=dict(fused=True, transposed=True, stacked=True, cache_stacked=True, heads_first=True),
)  # fmt: skip
"""How weights and caches may be kept."""


def laid_out(shape: Shape, batch: int, dtype, layout: dict, pos: int = 7, draw: Draw | None = None, **spelling):
    """A step and its operands for a layout."""
    how = {k: v for k, v in layout.items() if k in ("fused", "transposed", "stacked")}
    held = dict(stacked=layout.get("cache_stacked", False), heads_first=layout.get("heads_first", False))
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, shape.vocab, batch), jnp.int32)
    args = weights(shape, dtype, draw, **how), tokens, cache(shape, batch, dtype, draw, **held), jnp.int32(pos)
    return decoder(shape, **spelling, **layout), args
