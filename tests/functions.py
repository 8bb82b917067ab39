"""Functions of every kind, for every backend: what they are, and operands for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk.kinds import KINDS


def data(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape, np.float32).astype(dtype)


def ints(high: int, *shape: int, low: int = 0, dtype: Any = np.int32) -> np.ndarray:
    return np.random.default_rng(7).integers(low, high, shape).astype(dtype)


def gated(h: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.nn.silu(h @ a) * (h @ b)


NHWC = ("NHWC", "HWIO", "NHWC")


def conv(
    x: jax.Array, w: jax.Array, stride: Any = 1, padding: Any = "SAME", groups: int = 1, dims: Any = NHWC
) -> jax.Array:
    strides = stride if isinstance(stride, tuple) else (stride,) * (x.ndim - 2)
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dims, feature_group_count=groups)


def pool(x: jax.Array, f: Any, init: Any, stride: int = 1, padding: str = "SAME") -> jax.Array:
    return lax.reduce_window(x, init, f, (1, 3, 3, 1), (1, stride, stride, 1), padding)


F32, BF16 = jnp.float32, jnp.bfloat16

CASES: dict[str, tuple[Callable[..., Any], tuple]] = {
    "scalar": (lambda x, y: jnp.sin(x) * y + 1, (np.float32(0.3), np.float32(2.0))),
    "elementwise": (lambda x, y: (jnp.exp(x) - y / 3, jnp.tanh(y)), (data(5, 7), data(5, 7, seed=1))),
    "broadcast": (lambda x, y: x[:, None, None] * y[None] + 2, (data(5), data(3, 7))),
    "bf16": (lambda x, y: (x * y + x) * y, (data(3, 33, dtype=BF16), data(3, 33, dtype=BF16, seed=1))),
    "f16": (lambda x: jnp.exp(x) * x, (data(70, dtype=np.float16),)),
    "unsigned": (lambda x, y: (x // (y | 1), x % (y | 1), x >> 3, jnp.maximum(x, y), x < y),
                 (ints(1 << 30, 21, dtype=np.uint32) * np.uint32(7), ints(99, 21, dtype=np.uint32))),
    "integers": (lambda x, y: (x // (y | 1), lax.rem(x, y), x >> 2, x << 3, abs(x), jnp.sign(x), ~x,
                               lax.population_count(x)),
                 (ints(99, 25, low=-99), ints(9, 25, low=-9))),
    "small integers": (lambda x, y: (x + y, x * y, x.astype(jnp.int32) * 1000, x > y),
                       (ints(100, 9, low=-100, dtype=np.int8), ints(100, 9, low=-100, dtype=np.int8))),
    "bools": (lambda x: (x & (jnp.arange(11) > 4), ~x, jnp.any(x), jnp.all(x), x.astype(F32)), (ints(2, 11) == 1,)),
    "concatenate": (lambda x, y: jnp.concatenate([x, jnp.sin(y), x[:, :2]], 1) * 2, (data(4, 5), data(4, 3))),
    "concatenate rows": (lambda x, y: jnp.concatenate([x, y]).reshape(-1) + 1, (data(4, 5), data(3, 5))),
    "concatenate, reshape": (lambda x, y: jnp.concatenate([x, y]).reshape(3, -1) + 1, (data(4), data(5))),
    "concatenate, reverse": (lambda x, y: jnp.concatenate([x, y])[::-1] + jnp.arange(9.0), (data(4), data(5))),
    "concatenate, stride": (lambda x, y: jnp.concatenate([x, y])[1::3] * 1.0, (data(7), data(9))),
    "concatenate, sum": (lambda x, y: jnp.concatenate([x, y * 2], 1).sum(1), (data(4, 50), data(4, 3))),
    "concatenate, max": (lambda x, y: jnp.concatenate([x, y * 2], 1).max(1), (data(4, 50), data(4, 3))),
    "concatenate, argmax": (lambda x, y: jnp.argmax(jnp.concatenate([x, y * 2], 1), 1), (data(4, 50), data(4, 9))),
    "concatenate, two axes": (lambda x, y, w: _joined(x, y, w), (data(2, 2, 400), data(3, 2, 400), data(2))),
    "pad": (lambda x: jnp.pad(x, ((1, 2), (3, 0)), constant_values=5.0), (data(4, 5),)),
    "rotate half": (lambda x, c: x * c + jnp.concatenate([-x[..., 4:], x[..., :4]], -1), (data(3, 2, 8), data(8))),
    "interleave": (lambda x: jnp.stack([x[:, 0::2], -x[:, 1::2]], -1).reshape(x.shape), (data(3, 8),)),
    "transpose": (lambda x: x.transpose(2, 0, 1) * 2, (data(3, 5, 7),)),
    "reshape": (lambda x: x.reshape(5, 6).T.reshape(3, 10) + 1, (data(30),)),
    "reshape, odd": (lambda x: x.reshape(6, 10).T.reshape(4, 15) + x.reshape(4, 15), (data(60),)),
    "repeat": (lambda x: jnp.repeat(x, 3, 1) + jnp.tile(x, (1, 3)), (data(4, 5),)),
    "repeat, odd": (lambda x: jnp.repeat(x, 4) + jnp.tile(x, 4) + jnp.repeat(x[:4], 6), (data(6),)),
    "iota": (lambda x: x.reshape(6) + lax.broadcasted_iota(F32, (2, 3), 1).reshape(6), (data(2, 3),)),
    "sums": (lambda x: (x.sum(), x.sum(0), x.sum(1), x.sum((0, 2)), x.mean()), (data(5, 17, 3),)),
    "softmax": (lambda x: jax.nn.softmax(x * 3), (data(5, 37),)),
    "log softmax": (lambda x: jax.nn.log_softmax(x.astype(F32), 0), (data(5, 37, dtype=BF16),)),
    "layernorm": (lambda x, s: (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5) * s,
                  (data(5, 37), data(37))),
    "nested": (lambda x, y: jnp.sum(jnp.exp(x[:, :, None] - jnp.max(y, -1)[None, :, None]), (1, 2)),
               (data(3, 4), data(4, 6))),
    "nested, argmax": (lambda x: jnp.argmax(x.reshape(4, 5, 6).sum(2), 1), (data(4, 30),)),
    "argmin": (lambda x: (jnp.argmin(x, 0), jnp.argmax(x, 1)), (data(9, 40),)),
    "products": (lambda x: (jnp.prod(x, 1), jnp.min(x, 1), jnp.max(x)), (data(3, 21),)),
    "integer sums": (lambda x: (x.sum(1), x.max(0), x.min()), (ints(1 << 30, 3, 21),)),
    "gather": (lambda t, i: t[i] * 2, (data(11, 5), ints(11, 4))),
    "gather of gather": (lambda t, i, j: t[i[j]] + 1, (data(11, 5), ints(11, 4), ints(4, 6))),
    "take along axis": (lambda x, i: jnp.take_along_axis(x, i, 1), (data(4, 9), ints(9, 4, 3))),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i, 1), (3, 4)), (data(9, 7), np.int32(8))),
    "update": (lambda x, y, i: lax.dynamic_update_slice(x * 1, y, (i, jnp.int32(1))),
               (data(9, 7), data(2, 3), np.int32(8))),
    "scatter": (lambda x, i, y: x.at[i].set(y, mode="drop"), (data(9, 5), np.array([3, 12, 0], np.int32), data(3, 5))),
    "scatter, twice to one place": (lambda x, i, y: x.at[i].set(y, mode="drop"),
                                    (data(9, 5), ints(5, 40), data(40, 5))),
    "scatter, windows that overlap": (lambda x, i, y: (
        lax.scatter(x, i[:, None], y, lax.ScatterDimensionNumbers((1,), (), (0,))),
        lax.scatter(x, i[:, None], y.T, lax.ScatterDimensionNumbers((0,), (), (0,))),
        lax.scatter_add(x, i[:, None], y.T, lax.ScatterDimensionNumbers((0,), (), (0,)))),
        (data(40), ints(30, 50), data(50, 7))),
    "scatter add": (lambda x, i, y: x.at[i].add(y), (data(9, 5), np.array([3, 0, 3, 8], np.int32), data(4, 5))),
    "scatter add, drop": (lambda x, i, y: x.at[i].add(y, mode="drop"),
                          (ints(9, 9), np.array([3, 9, 3], np.int32), ints(9, 3))),
    "matmul": (lambda x, w: x @ w, (data(5, 19), data(19, 37))),
    "matmul, transposed": (lambda x, w: x @ w.T, (data(5, 19), data(37, 19))),
    "matvec": (lambda x, w: x @ w, (data(19), data(19, 37))),
    "dot": (lambda x, w: jnp.dot(x, w), (data(19), data(19, seed=1))),
    "outer": (lambda x, w: jnp.einsum("i,j->ij", x, w), (data(9), data(5))),
    "matmul, bf16": (lambda x, w: jax.nn.silu(x @ w), (data(3, 24, dtype=BF16), data(24, 40, dtype=BF16))),
    "norm, two matmuls": (
        lambda x, s, a, b: gated(x * lax.rsqrt((x * x).mean(1, keepdims=True) + 1e-6) * s, a, b),
        (data(3, 24), data(24), data(24, 33), data(24, 33, seed=1))),
    "matmul of concatenation": (lambda x, y, w: jnp.concatenate([x, y], 1) @ w,
                                (data(3, 10), data(3, 9), data(19, 20))),
    "batched": (lambda x, w: jnp.einsum("bhd,hde->bhe", x, w), (data(3, 4, 6), data(4, 6, 10))),
    "batched, permuted": (lambda x, w: jnp.einsum("bhd,hed->ebh", x, w), (data(3, 4, 6), data(4, 10, 6))),
    "two contracted axes": (lambda x, w: jnp.einsum("bhd,hdn->bn", x, w), (data(3, 4, 6), data(4, 6, 20))),
    "contracted axes, permuted": (lambda x, w: jnp.einsum("bhd,dhn->bn", x, w), (data(3, 4, 6), data(6, 4, 20))),
    "contracted axes apart": (lambda x, w: jnp.einsum("bhd,hnd->bn", x, w), (data(3, 4, 6), data(4, 20, 6))),
    "columns apart": (lambda x, w: jnp.einsum("bk,hkd->bhd", x, w), (data(3, 6), data(4, 6, 8))),
    "sliced weight": (lambda x, w: jnp.einsum("bk,khd->bhd", x, w[:, :, 2:6]), (data(3, 6), data(6, 4, 8))),
    "gathered weight": (lambda x, w, e: x @ w[e], (data(3, 6), data(5, 6, 20), np.int32(3))),
    "grouped": (lambda q, k: jnp.einsum("hgd,shd->hgs", q.reshape(2, 3, 8), k), (data(6, 8), data(10, 2, 8))),
    "integer matmul": (lambda x, w: x @ w, (ints(9, 4, 7), ints(9, 7, 5))),
    "integer matmul, wrapping": (lambda x, w: (x @ w, (x @ w) * 3 + 1), (ints(1 << 31, 4, 37), ints(1 << 31, 37, 21))),
    "integer matmul, 8 bits": (lambda x, w, v: (lax.dot(x, w, preferred_element_type=jnp.int32), lax.dot(x, v.T)),
                               (ints(128, 7, 75, low=-128, dtype=np.int8), ints(128, 75, 40, low=-128, dtype=np.int8),
                                ints(128, 33, 75, low=-128, dtype=np.int8))),
    "integer matmul, unsigned": (lambda x, w: lax.dot(x, w, preferred_element_type=jnp.uint32),
                                 (ints(1 << 16, 3, 70, dtype=np.uint16), ints(1 << 16, 70, 20, dtype=np.uint16))),
    "integers, float sum": (lambda x, w: lax.dot(x, w, preferred_element_type=F32),
                            (ints(1 << 31, 3, 40, low=-(1 << 31)), ints(1 << 31, 40, 20, low=-(1 << 31)))),
    "dequantised": (lambda x, w, s: lax.dot(x, w, preferred_element_type=jnp.int32).astype(F32) * s + 1,
                    (ints(128, 2, 64, low=-128, dtype=np.int8), ints(128, 64, 48, low=-128, dtype=np.int8), data(48))),
    "waves": (lambda x: (jnp.sin(x), jnp.cos(x), jnp.tan(x)),
              (np.concatenate([data(40) * np.float32(2) ** np.arange(-20, 20), data(40) * np.float32(2) ** np.arange(86, 126),
                               np.array([np.inf, -np.inf, np.nan, 3.4e38, 1048576], np.float32)]).astype(np.float32),)),
    "wide": (lambda a, b, c: (jax.nn.silu(a) * b, a + c, (b * 2, b.astype(F32) * 3)),
             (data(264, 1024, dtype=BF16), data(264, 1024, dtype=BF16, seed=1), data(1024, dtype=BF16))),
    "wide, types": (lambda a, b, i: (a * b + 1, a > b, jnp.where(a > b, i, -i), i.astype(jnp.int32) * 3, a.astype(BF16) + 1),
                    (data(264, 1024), data(264, 1024, seed=1), ints(100, 264, 1024, low=-100, dtype=np.int8))),
    "wide, rows": (lambda a, i: (a[i] * 2, a[::-1] + jnp.arange(1024, dtype=F32)), (data(264, 1024), ints(264, 300))),
    "wide, pieces": (lambda a, b: (jnp.concatenate([a, b * 2], 1) * 3, jnp.pad(a, ((0, 0), (4, 12))) + 1),
                     (data(264, 520, dtype=BF16), data(264, 504, dtype=BF16))),
    "runs that start anywhere": (
        lambda x: (jnp.concatenate([jnp.zeros((3, 4), x.dtype), x[:, 4:]], 1), x.at[:, :4].set(0) * 1,
                   jnp.concatenate([x[:, 8:20], jnp.ones((3, 4), x.dtype), x[:, 24:]], 1)),
        (data(3, 64, dtype=BF16),)),
    "right sides of two types": (
        lambda x, a, b: jax.nn.silu(jnp.tanh(x) @ jnp.sin(a)) * lax.dot(jnp.tanh(x), jnp.sin(b), preferred_element_type=F32),
        (data(3, 24), data(24, 40), data(24, 40, dtype=BF16))),
    "batches that no tile divides": (lambda x, y: (jnp.sort(jnp.concatenate([x, x * 2], 1), 0), jnp.einsum("abij,bakj->abik", y, y)),
                                     (data(31, 16, 11), data(17, 17, 5, 40))),
    "sort": (lambda x: (jnp.sort(x, 1), jnp.argsort(x, 1)), (data(4, 13),)),
    "sort, integers": (lambda x: jnp.sort(x), (ints(5, 30),)),
    "top k": (lambda x: lax.top_k(x, 3), (data(4, 13),)),
    "top k, bf16": (lambda x: lax.top_k(x * 2, 5), (data(2, 40, dtype=BF16),)),
    "six axes": (lambda x: x.transpose(5, 3, 1, 0, 2, 4) + 1, (data(2, 3, 2, 2, 3, 2),)),
    "units": (lambda x: x.reshape(1, 4, 1, 5).sum((0, 2), keepdims=True) * 2, (data(4, 5),)),
    "cumulative": (lambda x: jnp.cumsum(x, 1), (data(3, 17),)),
    "weight repeated along k": (lambda x, w: x @ jnp.repeat(w, 3, 0), (data(2, 12), data(4, 5))),
    "weight tiled along k": (lambda x, w: x @ jnp.tile(w, (3, 1)), (data(2, 12), data(4, 5))),
    "activation repeated along k": (lambda x, w: jnp.repeat(x, 2, 1) @ w, (data(3, 4), data(8, 5))),
    "weight tiled along n": (lambda x, w: x @ jnp.tile(w, (1, 3)), (data(3, 4), data(4, 5))),
    "contraction with a broadcast": (lambda x, y: jnp.einsum("bnd,bnd->b", x, jnp.broadcast_to(y, (2, 3, 4))),
                                     (data(2, 3, 4), data(2, 1, 4))),
    "values repeated along keys": (lambda p, v: jnp.einsum("hs,shd->hd", p, jnp.repeat(v, 2, 0)), (data(2, 6), data(3, 2, 4))),
    "weight that is one number": (lambda x, s: x @ jnp.full((3,), s), (data(4, 3), np.float32(2))),
    "pad, interior, rolled": (lambda x: lax.pad(jnp.roll(x, 1), np.float32(0), ((0, 5, 1),)), (data(6),)),
    "pad, interior, joined": (lambda x: lax.pad(jnp.concatenate([x, x * 2]), np.float32(1), ((2, 3, 2),)), (data(5),)),
    "pad, interior, two axes": (lambda x: lax.pad(jnp.roll(x, 2, 1), np.float32(3), ((1, 0, 2), (-1, 4, 1))), (data(3, 5),)),
    "padded, then indexed": (lambda x, i: (lax.dynamic_index_in_dim(jnp.pad(x.reshape(16, 3), ((1, 1), (0, 0))), i, 1),
                                           jnp.pad(x.reshape(4, 4, 3), ((0, 0), (1, 2), (0, 0))).reshape(28, 3)[:, i] * 2),
                             (data(48), np.int32(1))),
    "update at a constant place": (lambda x: (x * 2).at[0].set(1.0), (data(5),)),
    "update of zeros": (lambda y: jnp.zeros((4, 5)).at[1].set(y), (data(5),)),
    "update of a column": (lambda x: x.at[:, 3].set(-jnp.inf), (data(2, 7),)),
    "update of a window": (lambda x, u: lax.dynamic_update_slice(x + 1, u, (1, 2)), (data(4, 5), data(2, 3))),
    "update, strided": (lambda x, u: (x * 3).at[1::2].add(u), (data(9, 4), data(4, 4))),
    "updates of one value": (lambda x: ((x * 2).at[0].set(1.0).at[0].add(2.0).at[1:3].set(3.0)), (data(5, 2),)),
    "cross entropy, gradient": (
        lambda z, y: jax.grad(lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).sum())(z),
        (data(4, 9), ints(9, 4))),
    "scatter at joined places": (lambda x, i, j: x.at[jnp.concatenate([i, j])].set(1.0),
                                 (data(9), np.array([1, 3], np.int32), np.array([5, 6, 1], np.int32))),
    "unique, floats": (lambda x: jnp.unique(x, size=5, fill_value=0), (ints(4, 3, 7).astype(np.float32),)),
    "unique": (lambda x: jnp.unique(x, size=4), (ints(5, 9),)),
    "transposed and updated": (lambda a, b, u, i: (lambda y: (y.T, lax.dynamic_update_slice(y, u, (i, 0))))(a @ b),
                               (data(4, 6), data(6, 5), data(1, 5), np.int32(2))),
    "reshape and stride": (lambda y: (y.reshape(5, 10, 2), y[:66:2]), (data(100),)),
    "one of many keys": (lambda i: jax.random.uniform(jax.random.split(jax.random.key(0), 4)[i], (3,)), (np.int32(1),)),
    "keys, moved": (lambda s: jax.vmap(lambda k: jax.random.bits(k, (2,)))(
        jnp.concatenate([jax.random.split(jax.random.key(s), 3)[::-1], jax.random.split(jax.random.key(1), 2)]).reshape(5)),
        (np.uint32(5),)),
    "cumulative, blocks": (lambda x: (jnp.cumsum(x, 1), lax.cummax(x, 1, reverse=True), jnp.cumsum(x, 0)), (data(3, 75),)),
    "cumulative, then in other dimensions": (
        lambda x, w: (lambda s: (s.transpose(2, 1, 0), s.sum(0), s.transpose(2, 0, 1) @ w, s.reshape(6, 60).T))(
            jnp.sin(jnp.cumsum(x, 1).reshape(3, 12, 10) + jnp.arange(12.0)[:, None])),
        (data(3, 120), data(12, 2))),
    "cumulative, integers": (lambda x: (lax.cumsum(x, reverse=True), lax.cumprod(x), lax.cummin(x)), (ints(3, 130, low=-2),)),
    "cumulative extremes, gradient": (lambda x: jax.grad(lambda x: lax.cummin(x, 1, reverse=True).sum())(x), (data(3, 5),)),
    "signed zeros": (lambda x, y: (jnp.maximum(x, y), jnp.minimum(x, y), jnp.clip(x, 0, 1), lax.clamp(np.float32(-0.0), x, np.float32(1)),
                                   x.max(), x.min(), lax.cummin(x), lax.cummax(y)),
                     (np.array([0, -0.0, 0, -0.0, 0.5], np.float32), np.array([-0.0, 0, 0, -0.0, -0.0], np.float32))),
    "convolution": (lambda x, w, b: jax.nn.relu(conv(x, w, 2) + b), (data(1, 7, 6, 3), data(3, 3, 3, 9), data(9))),
    "convolution, valid": (lambda x, w: conv(x, w, 1, "VALID"), (data(1, 4, 5, 6), data(2, 3, 6, 4))),
    "convolution, bf16": (lambda x, w: conv(x, w), (data(1, 5, 4, 4, dtype=BF16), data(3, 1, 4, 6, dtype=BF16))),
    "patches": (lambda x, w: conv(x, w, (3, 2), "VALID"), (data(2, 6, 4, 3), data(3, 2, 3, 8))),
    "convolution, channels first": (
        lambda x, w: conv(x, w, 1, [(1, 0), (2, -1)], dims=("NCHW", "OIHW", "NCHW")), (data(2, 3, 4, 5), data(5, 3, 2, 3))),
    "convolution, one axis": (lambda x, w: conv(x, w, 1, dims=("NWC", "WIO", "NWC")), (data(1, 9, 4), data(3, 4, 5))),
    "depthwise": (lambda x, w: jax.nn.silu(conv(x, w, 1, [(3, 0)], 6, ("NWC", "WIO", "NWC"))), (data(2, 7, 6), data(4, 1, 6))),
    "depthwise, several": (lambda x, w: conv(x, w, groups=3), (data(1, 4, 5, 3), data(2, 3, 1, 6))),
    "convolution, grouped": (lambda x, w: conv(x, w, groups=2), (data(1, 4, 3, 6), data(2, 2, 3, 18))),
    "convolution, dilated": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 2), [(2, 1), (0, 3)], (2, 1), (1, 2), NHWC), (data(1, 3, 6, 2), data(3, 2, 2, 3))),
    "convolution, transposed": (lambda x, w: lax.conv_transpose(x, w, (2, 3), "SAME"), (data(1, 3, 2, 3), data(3, 4, 3, 2))),
    "convolution, gradient": (
        lambda x, w: jax.grad(lambda x, w: (conv(x, w, 2) ** 2).sum(), (0, 1))(x, w), (data(1, 5, 4, 2), data(3, 2, 2, 3))),
    "depthwise, gradient": (
        lambda x, w: jax.grad(lambda x, w: (conv(x, w, 1, [(2, 0)], 3, ("NWC", "WIO", "NWC")) ** 2).sum(), (0, 1))(x, w),
        (data(2, 4, 3), data(3, 1, 3))),
    "convolution, integers": (lambda x, w: conv(x, w, 1, "SAME"), (ints(9, 1, 4, 3, 2), ints(9, 2, 2, 2, 3, low=-9))),
    "windows overlapping by steps": (
        lambda x, w: lax.conv_general_dilated(x, w, (3, 3), [(2, 4), (2, 4)], (2, 1), (3, 1), ("HNWC", "IWHO", "HCNW"), 1, 3),
        (data(8, 9, 7, 3), data(3, 2, 3, 27))),
    "pooling": (lambda x: (pool(x, lax.max, -np.inf), pool(x, lax.min, np.inf, padding="VALID"), pool(x, lax.add, 0.0) / 9,
                           pool(x, lax.mul, 1.0, 2)), (data(1, 5, 6, 4),)),
    "pooling, integers": (lambda x: (pool(x, lax.max, np.int32(-(2**31))), pool(x, lax.add, np.int32(0), 2)), (ints(99, 1, 5, 4, 3, low=-99),)),
    "pooling, long": (lambda x: lax.reduce_window(x, 0.0, lax.add, (70,), (3,), "SAME", window_dilation=(2,)), (data(100),)),
    "pooling, spread": (lambda x: lax.reduce_window(x, -np.inf, lax.max, (2, 3), (1, 2), [(1, 0), (-1, 2)], (2, 1), (1, 2)), (data(5, 9),)),
    "pooling by a function": (lambda x: pool(x, jnp.logaddexp, -np.inf, 2), (data(1, 4, 5, 2),)),
    "pooling, gradient": (lambda x: jax.grad(lambda x: (pool(x, lax.max, -np.inf) ** 2).sum())(x), (data(1, 5, 4, 3),)),
    "pooling, tangents": (lambda x, t: jax.jvp(lambda x: pool(x, lax.min, np.inf), (x,), (t,))[1], (data(1, 5, 4, 3), data(1, 5, 4, 3, seed=1))),
    "average pooling, gradient": (lambda x: jax.grad(lambda x: (pool(x, lax.add, 0.0) ** 2).sum())(x), (data(1, 5, 4, 3),)),
    "reductions by functions": (lambda x, i: (lax.reduce(x, -np.inf, jnp.logaddexp, (0,)), lax.reduce(x, 2.0, lax.add, (1,)),
                                              lax.reduce_xor(i, (0, 1)), lax.reduce_xor(i, (1,))), (data(18, 3), ints(1 << 30, 5, 20))),
    "special functions": (lambda x: (lax.erf_inv(jnp.tanh(x)), lax.lgamma(x * 3), lax.digamma(x * 3), jnp.log2(abs(x)), lax.erfc(x)), (data(40),)),
    "normal": (lambda k: jax.random.normal(k, (5, 7)), (np.array([1, 2], np.uint32),)),
    "next after": (lambda x, y: (lax.nextafter(x, y), lax.nextafter(x.astype(BF16), y.astype(BF16)), lax.nextafter(x.astype(np.float16), y.astype(np.float16))),
                   (np.array([0, -0.0, 1, -1, 1, 60000, 0.5], np.float32), np.array([1, -1, 2, -2, 0, np.inf, -np.inf], np.float32))),
    "bits of other widths": (lambda x, b: (lax.bitcast_convert_type(x, np.uint8), lax.bitcast_convert_type(x, BF16), lax.bitcast_convert_type(b, np.float32),
                                           lax.bitcast_convert_type(b, np.int32), lax.bitcast_convert_type(b[:, :2], np.float16)),
                             (data(6), ints(120, 5, 4, dtype=np.uint8))),
    "search": (lambda x, y: (jnp.searchsorted(jnp.sort(x), y), jnp.histogram(y, bins=4, range=(-2.0, 2.0))[0]), (data(20), data(9))),
    "cumulative logsumexp": (lambda x: (lax.cumlogsumexp(x, 1), lax.cumlogsumexp(x, 1, reverse=True)), (data(2, 70),)),
    "approximate top k": (lambda x: (lax.approx_max_k(x, 3), lax.approx_min_k(x, 2, reduction_dimension=0)), (data(4, 13),)),
    "top k along rows": (lambda x: lax.top_k(x.T, 2), (data(4, 13),)),
    "ragged dot": (lambda x, w, n: lax.ragged_dot(x, w, n), (data(9, 6), data(4, 6, 5), np.array([3, 0, 4, 1], np.int32))),
    "ragged dot, gradient": (lambda x, w, n: jax.grad(lambda x, w: (lax.ragged_dot(x, w, n) ** 2).sum(), (0, 1))(x, w),
                             (data(7, 4), data(3, 4, 5), np.array([3, 0, 4], np.int32))),
    "scatter extremes": (lambda x, i, y: (x.at[i].max(y), x.at[i].min(y), x.at[i].mul(y), x.at[i].subtract(y)),
                         (data(9, 5), np.array([3, 0, 3, 12], np.int32), data(4, 5))),
    "scatter extremes, integers": (lambda x, i, y: (x.at[i].max(y), x.at[i].min(y, mode="drop"), x.at[i].mul(y)),
                                   (ints(250, 9, dtype=np.uint8), np.array([3, 9, 3], np.int32), ints(250, 3, dtype=np.uint8))),
    "scatter extremes, narrow": (lambda x, i, y: (x.at[i].max(y), x.at[i].mul(y)),
                                 (data(9, dtype=BF16), np.array([3, 1, 3], np.int32), data(3, dtype=BF16))),
    "scatter by functions": (lambda x, i: (x.at[i].apply(lambda v: v * 3), x.at[i[0]].apply(jnp.sin), x.at[1:4].apply(jnp.exp)),
                             (data(9), np.array([3, 1, 3], np.int32))),
    "platform": (lambda x: lax.platform_dependent(x, cpu=jnp.sin, cuda=jnp.sin, default=lambda x: jnp.linalg.inv(x)), (data(3, 3),)),
    "sums of a recurrence": (lambda a, x: (lax.scan(lambda h, t: (h * jnp.exp(t[0][:, None] * a) + (t[0] * t[1])[:, None], None),
                                                    a, (x, x + 1))[0] ** 2).sum(1), (data(3, 4), data(70, 3) / 16)),
    "constants": (lambda x: x + np.arange(12, dtype=np.float32).reshape(3, 4) * np.float32(1.5), (data(3, 4),)),
}  # fmt: skip
"""One function for everything that the compiler lowers: name -> function, operands."""


def _layernorm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x.astype(F32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * scale


def _joined(x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """An operator in pieces along two axes, and cut so that some tiles miss some pieces in both."""
    z = jnp.concatenate([x, y])
    return jnp.concatenate([jnp.tanh(z) * w[:, None], jnp.sin(z)[:, :, ::-1]], 2)


def mlp(x: jax.Array, w1: jax.Array, w2: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm, GELU, a skip."""
    return x + jax.nn.gelu(_layernorm(x, scale).astype(x.dtype) @ w1) @ w2


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Odd sizes, a random mask."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def fork(x: jax.Array, w1: jax.Array, w2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two branches that join later."""
    a = jnp.dot(x, w1, preferred_element_type=F32)
    b = jnp.tanh(jnp.dot(x, w2, preferred_element_type=F32))
    return (a * b + jnp.flip(a, -1)).astype(x.dtype), (a - b).sum(0)


def shared_reduction(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A reduction that feeds two consumers."""
    total = jnp.exp(x.astype(F32)).sum(-1, keepdims=True)
    return (x / total).astype(x.dtype) @ w, x + jnp.log(total).astype(x.dtype)


def experts(x: jax.Array, router: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A mixture over all experts."""
    weight, chosen = lax.top_k(jax.nn.softmax(x.astype(F32) @ router), 2)
    gates = (jax.nn.one_hot(chosen, router.shape[1]) * weight[..., None]).sum(1).astype(x.dtype)
    return jnp.einsum("tef,efd,te->td", jax.nn.silu(jnp.einsum("td,edf->tef", x, up)), down, gates)


def layers(x: jax.Array, ws: jax.Array, scales: jax.Array) -> jax.Array:
    """A scan over stacked layers."""

    def layer(x: jax.Array, p: tuple) -> tuple[jax.Array, None]:
        return x + jnp.tanh(_layernorm(x, p[1]).astype(x.dtype) @ p[0]), None

    return lax.scan(layer, x, (ws, scales))[0]


def no_decoder(name: str, rows: int, dtype: Any) -> tuple[Callable[..., Any], tuple]:
    """A function that is no language model, and operands: `rows` of activations, weights scaled by their depth."""

    def x(*shape: int, seed: int = 0) -> np.ndarray:
        return data(*shape, dtype=dtype, seed=seed)

    def w(*shape: int, seed: int = 1) -> np.ndarray:
        return (data(*shape, seed=seed) / np.sqrt(shape[-2])).astype(dtype)

    mask = data(rows, 1, 5, 7, seed=3) > -0.5
    mask[..., 0] = True  # no row without a key
    return {
        "mlp": (mlp, (x(rows, 264), w(264, 520), w(520, 264), data(264, seed=2))),
        "attention": (attention, (x(rows, 5, 6, 11), x(rows, 7, 3, 11, seed=1), x(rows, 7, 3, 11, seed=2), mask)),
        "fork": (fork, (x(rows, 256), w(256, 192), w(256, 192, seed=2))),
        "shared reduction": (shared_reduction, (x(rows, 384), w(384, 136))),
        "experts": (experts, (x(rows, 48), data(48, 4), w(4, 48, 64), w(4, 64, 48, seed=2))),
        "layers": (layers, (x(rows, 128), w(4, 128, 128), data(4, 128))),
    }[name]


TASKS = {f"{k.name}: {c.name}": (c.fn, c.make(np.random.default_rng(7))) for k in KINDS for c in k.cases}
"""The cases of every kind of task: name -> function, operands."""
NO_DECODERS = "mlp", "attention", "fork", "shared reduction", "experts", "layers"
