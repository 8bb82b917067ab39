"""Functions of every kind, as a user would write them: what `benchmarks.choose` runs.

A case is made when it is run: `CASES[name].make()` gives a function of arrays and its operands (random, never zeros).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Made = tuple[Callable[..., Any], tuple[Any, ...]]
BF16, F32, I8 = jnp.bfloat16, jnp.float32, jnp.int8


@dataclass(frozen=True)
class Case:
    """kind: what is reported together. make: the function and its operands. large: left out without an accelerator.
    carried: the operands that a loop replaces, by what `take` gives of the results."""

    kind: str
    make: Callable[[], Made]
    large: bool = False
    carried: tuple[int, ...] = ()
    take: Callable[[Any], tuple[Any, ...]] = lambda out: ()


CASES: dict[str, Case] = {}


def _case(kind: str, name: str, fn: Callable[..., Any], *specs: Any, **loop: Any) -> None:
    """Specs are callables that give an operand."""
    assert name not in CASES, name
    CASES[name] = Case(kind, lambda: (fn, tuple(jax.tree.map(lambda s: s(), s) for s in specs)), **loop)


def looped(fn: Callable[..., Any], case: Case, steps: int) -> Callable[..., Any]:
    """`fn` that often, one after the other and inside one jit; gives the last results. Where nothing is carried, an element of the
    first operand depends on the results before, so that no step can be left out or moved out of the loop."""
    at = case.carried or (0,)

    def run(*operands: Any) -> Any:
        def body(_: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            now = list(operands)
            for k, x in zip(at, carry[0], strict=True):
                now[k] = x
            out = fn(*now)
            return (case.take(out) if case.carried else (_tied(carry[0][0], out),)), out

        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *operands))
        return lax.fori_loop(0, steps, body, (tuple(operands[k] for k in at), first))[1]

    return run


def _tied(x: Any, out: Any) -> Any:
    """`x`, as far as anybody can tell only after `out`."""
    leaves, tree = jax.tree.flatten(x)
    seen = jax.tree.leaves(out)[0].ravel()[0].astype(F32) > 3e38
    at = (0,) * leaves[0].ndim
    return jax.tree.unflatten(tree, [leaves[0].at[at].add(seen.astype(leaves[0].dtype)), *leaves[1:]])


def n(*shape: int, dtype: Any = F32) -> Callable[[], jax.Array]:
    """Normal random numbers, small enough to be multiplied many times."""
    seed = sum((i + 1) * s for i, s in enumerate(shape))
    return lambda: jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) / 8, dtype)


def i(high: int, *shape: int, dtype: Any = jnp.int32) -> Callable[[], jax.Array]:
    """Integers from 0, or of an int8 from -high."""
    low = -high if dtype == I8 else 0
    return lambda: jnp.asarray(np.random.default_rng(high + sum(shape)).integers(low, high, shape), dtype)


# ------------------------------------------------------------------------------------------------- element by element

gelu_mix = lambda x, y: jax.nn.gelu(x) * jnp.where(y > 0, jnp.exp(-y), 1.0) + jnp.tanh(x * y)

for _n in (8, 4096, 1 << 18, 1 << 22):
    _case("elementwise", f"add {_n}", lambda x, y: x + y, n(_n), n(_n))
    _case("elementwise", f"transcendental {_n}", gelu_mix, n(_n), n(_n))
_case("elementwise", "add bf16 2^20", lambda x, y: x + y, n(1 << 20, dtype=BF16), n(1 << 20, dtype=BF16))
_case("elementwise", "transposed sum", lambda x, y: x.T + y, n(1024, 1024), n(1024, 1024))
_case("elementwise", "bits of uint32", lambda x: (x ^ (x >> 13)) * 5 + (x << 3), i(1 << 30, 1 << 18, dtype=jnp.uint32))
_case("elementwise", "ten results", lambda x: [x * k + k for k in range(10)], n(4096))
_case("elementwise", "random normal 2^16", lambda k: jax.random.normal(jax.random.wrap_key_data(k), (1 << 16,)),
      i(1 << 30, 2, dtype=jnp.uint32))  # fmt: skip

# ------------------------------------------------------------------------------------------------------ rows and norms


def rms(x: jax.Array, w: jax.Array) -> jax.Array:
    return (x * lax.rsqrt(jnp.mean(jnp.square(x.astype(F32)), -1, keepdims=True) + 1e-6) * w).astype(x.dtype)


def layer_norm(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


for _r in (1, 64, 4096):
    _case("norm", f"rms norm {_r} x 1024", rms, n(_r, 1024), n(1024))
    _case("norm", f"softmax {_r} x 1024", jax.nn.softmax, n(_r, 1024))
_case("norm", "layer norm 256 x 768", layer_norm, n(256, 768), n(768), n(768))
_case("norm", "rms norm bf16 8 x 4096", rms, n(8, 4096, dtype=BF16), n(4096, dtype=BF16))
_case("norm", "batch norm", lambda x: (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5), n(512, 256))
_case("reduction", "sum 2^20", jnp.sum, n(1 << 20))
_case("reduction", "sum of rows", lambda x: x.sum(-1), n(1024, 1024))
_case("reduction", "sum of columns", lambda x: x.sum(0), n(1024, 1024))
_case("reduction", "argmax 8 x 32000", lambda x: jnp.argmax(x, -1), n(8, 32000))
_case("reduction", "logsumexp", lambda x: jax.nn.logsumexp(x, -1), n(128, 4096))
_case("reduction", "variance of all", jnp.var, n(512, 512))
_case("reduction", "maximum small", jnp.max, n(64))

# ------------------------------------------------------------------------------------------------------------ matrices

matmul = lambda x, w: x @ w
for _d, _t in (("f32", F32), ("bf16", BF16)):
    for _m, _k in ((1, 1024), (4, 1024), (8, 2048), (16, 1024), (32, 1024), (64, 1024), (512, 1024), (4096, 512)):
        _case("matmul", f"matmul {_d} {_m} x {_k}", matmul, n(_m, _k, dtype=_t), n(_k, _k, dtype=_t))
    _case(
        "matmul",
        f"matmul {_d} transposed 1 x 2048",
        lambda x, w: x @ w.T,
        n(1, 2048, dtype=_t),
        n(2048, 2048, dtype=_t),
    )
    _case("matmul", f"matmul {_d} tiny", matmul, n(4, 16, dtype=_t), n(16, 16, dtype=_t))
    _case("matmul", f"matmul {_d} wide 1 x 4096", matmul, n(1, 4096, dtype=_t), n(4096, 8192, dtype=_t))
_case("matmul", "matmul f16 4 x 1024", matmul, n(4, 1024, dtype=jnp.float16), n(1024, 1024, dtype=jnp.float16))
_case("matmul", "batched 16 x 128", lambda x, y: jnp.einsum("bij,bjk->bik", x, y), n(16, 128, 128), n(16, 128, 128))
_case("matmul", "outer", lambda x, y: jnp.outer(x, y), n(1024), n(1024))
_dot32 = lambda x, w: lax.dot(x, w, preferred_element_type=jnp.int32)
_case("integer", "int8 matvec 2048", _dot32, i(127, 1, 2048, dtype=I8), i(127, 2048, 2048, dtype=I8))
_case("integer", "int8 matmul 64 x 1024", _dot32, i(127, 64, 1024, dtype=I8), i(127, 1024, 1024, dtype=I8))
_case(
    "integer",
    "int8 weights, f32",
    lambda x, w, s: (x @ w.astype(F32)) * s,
    n(1, 2048),
    i(127, 2048, 2048, dtype=I8),
    n(2048),
)
_case("integer", "int8 weights, bf16", lambda x, w, s: (x @ w.astype(BF16)) * s, n(2, 2048, dtype=BF16),
      i(127, 2048, 2048, dtype=I8), n(2048, dtype=BF16))  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- attention


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
    """Queries [B, H, Q, D], keys and values [B, H, S, D]."""
    s = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=F32) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhqs,bhsd->bhqd", jax.nn.softmax(jnp.where(mask, s, -1e30), -1).astype(v.dtype), v)


def cached(q: jax.Array, new: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array) -> Any:
    """One token: queries [B, G, N, D], caches [B, S, G, D]."""
    k = lax.dynamic_update_slice(k, new, (0, pos, 0, 0))
    v = lax.dynamic_update_slice(v, new * 2, (0, pos, 0, 0))
    s = jnp.einsum("bgnd,bsgd->bgns", q, k, preferred_element_type=F32) * 0.1
    p = jax.nn.softmax(jnp.where(jnp.arange(k.shape[1]) <= pos, s, -1e30), -1).astype(v.dtype)
    return jnp.einsum("bgns,bsgd->bgnd", p, v), k, v


_pos = lambda at: lambda: jnp.int32(at)
for _d, _t in (("f32", F32), ("bf16", BF16)):
    for _b in (1, 8):
        _case("attention", f"attention decode {_d} {_b}", cached, n(_b, 8, 2, 64, dtype=_t), n(_b, 1, 8, 64, dtype=_t),
              n(_b, 512, 8, 64, dtype=_t), n(_b, 512, 8, 64, dtype=_t), _pos(500), carried=(2, 3), take=lambda out: (out[1], out[2]))  # fmt: skip
    _case("attention", f"attention prefill {_d}", lambda q, k, v: attend(q, k, v, jnp.tri(256, dtype=bool)),
          *(n(1, 8, 256, 64, dtype=_t) for _ in range(3)))  # fmt: skip
_case(
    "attention",
    "attention tiny",
    lambda q, k, v: attend(q, k, v, jnp.tri(8, dtype=bool)),
    *(n(1, 2, 8, 8) for _ in range(3)),
)

# ---------------------------------------------------------------------------------------- indices, sorts, windows, scans

_case("gather", "embedding 8 of 32000", lambda w, t: w[t], n(32000, 256), i(32000, 8))
_case("gather", "embedding 512 of 32000", lambda w, t: w[t], n(32000, 256), i(32000, 512))
_case("gather", "take along", lambda x, t: jnp.take_along_axis(x, t, -1), n(64, 4096), i(4096, 64, 512))
_case("scatter", "scatter add rows", lambda x, t, y: x.at[t].add(y), n(1000, 64), i(1000, 5000), n(5000, 64))
_case("scatter", "scatter set 4 rows", lambda x, t, y: x.at[t].set(y), n(1000, 64), i(1000, 4), n(4, 64))
_case("scatter", "histogram", lambda x: jnp.zeros(256, jnp.int32).at[x].add(1), i(255, 100000))
_case("sort", "sort 16 x 64", lambda x: jnp.sort(x, -1), n(16, 64))
_case("sort", "sort 65536", jnp.sort, n(1 << 16))
_case("sort", "argsort 32 x 2048", lambda x: jnp.argsort(x, -1), n(32, 2048))
_case("sort", "top 8 of 32000", lambda x: lax.top_k(x, 8), n(4, 32000))
_case("scan", "cumsum 64 x 1024", lambda x: jnp.cumsum(x, -1), n(64, 1024))
_case("scan", "cumsum 65536", jnp.cumsum, n(1 << 16))
_case("scan", "cumsum 1 x 128256", lambda x: jnp.cumsum(x, -1), n(1, 128256))
_case(
    "scan",
    "linear recurrence",
    lambda a, x: lax.scan(lambda h, ax: (ax[0] * h + ax[1],) * 2, x[0], (a, x))[1],
    n(32, 256),
    n(32, 256),
)
_case("window", "conv 3 x 3", lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
      n(1, 32, 32, 16), n(3, 3, 16, 32))  # fmt: skip
_case("window", "conv 1-D causal", lambda x, w: lax.conv_general_dilated(x, w, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
                                                                        feature_group_count=256), n(2, 64, 256), n(4, 1, 256))  # fmt: skip
_case(
    "window",
    "max pool",
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    n(4, 64, 64, 16),
)
_case("other", "fft 4096", lambda x: jnp.abs(jnp.fft.fft(x)), n(16, 4096))
_case("other", "solve 64", lambda a, b: jnp.linalg.solve(a + 8 * jnp.eye(64), b), n(64, 64), n(64, 4))
_case("other", "concatenate", lambda x, y: jnp.concatenate([x, y * 2, x], -1), n(256, 512), n(256, 512))

# -------------------------------------------------------------------------------------------------------------- networks


def mlp(x: jax.Array, layers: Any) -> jax.Array:
    for w, b in layers:
        x = jax.nn.relu(x @ w + b)
    return x


def gated(x: jax.Array, layers: Any) -> jax.Array:
    """Norm, gate and up, down, residual."""
    for p in layers:
        h = rms(x, p["norm"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return x


def _dense(width: int, layers: int, dtype: Any = F32) -> Any:
    return [(n(width, width, dtype=dtype), n(width, dtype=dtype)) for _ in range(layers)]


def _gated(width: int, hidden: int, layers: int, dtype: Any = F32) -> Any:
    return [{"norm": n(width, dtype=dtype), "gate": n(width, hidden, dtype=dtype), "up": n(width, hidden, dtype=dtype),
             "down": n(hidden, width, dtype=dtype)} for _ in range(layers)]  # fmt: skip


for _r in (1, 8, 256):
    _case("mlp", f"mlp {_r} x 256", mlp, n(_r, 256), _dense(256, 4))
    _case("mlp", f"mlp {_r} x 1024", mlp, n(_r, 1024), _dense(1024, 4))
_case("mlp", "mlp tiny", mlp, n(1, 16), _dense(16, 3))
_case("mlp", "mlp bf16 1 x 1024", mlp, n(1, 1024, dtype=BF16), _dense(1024, 4, BF16))
for _d, _t in (("f32", F32), ("bf16", BF16)):
    for _r in (1, 8, 128):
        _case("mlp", f"gated {_d} {_r} x 1024", gated, n(_r, 1024, dtype=_t), _gated(1024, 2816, 2, _t))
_case("mlp", "8 small layers", gated, n(1, 256), _gated(256, 512, 8))

_loss = lambda x, layers, y: jnp.mean(jnp.square(mlp(x, layers) - y))
_train = lambda x, layers, y: jax.tree.map(lambda p, g: p - 0.1 * g, layers, jax.grad(_loss, 1)(x, layers, y))
_case("training", "mlp step 64 x 256", _train, n(64, 256), _dense(256, 3), n(64, 256))
_case("training", "mlp step 512 x 512", _train, n(512, 512), _dense(512, 3), n(512, 512))
_case("training", "mlp step tiny", _train, n(4, 16), _dense(16, 2), n(4, 16))
_case("training", "gradient of 1 x 1024", jax.grad(_loss, 1), n(1, 1024), _dense(1024, 2), n(1, 1024))
_adam = lambda p, g, m, v: (p - 0.01 * (0.9 * m + 0.1 * g) * lax.rsqrt(0.99 * v + 0.01 * g * g + 1e-8), 0.9 * m + 0.1 * g,
                            0.99 * v + 0.01 * g * g)  # fmt: skip
_case("training", "adam 2^20", _adam, *(n(1 << 20) for _ in range(3)), lambda: abs(n(1 << 20)()))
_case("batched", "vmap of a matvec", jax.vmap(lambda x, w: jnp.tanh(w @ x)), n(32, 64), n(32, 64, 64))
_case("batched", "vmap of an mlp, 16 rows", jax.vmap(mlp, (0, None)), n(16, 256), _dense(256, 3))
_case("batched", "vmap of a softmax", jax.vmap(jax.vmap(jax.nn.softmax)), n(8, 16, 128))
_case(
    "batched", "ensemble of mlps", jax.vmap(mlp, (None, 0)), n(1, 128), [(n(8, 128, 128), n(8, 128)) for _ in range(3)]
)

# ---------------------------------------------------------------------------------------------------------------- models


def _decode(preset: str, batch: int, slots: int, dtype: Any, **changes: Any) -> Callable[[], Made]:
    """A decode step in the middle of a cache."""

    def make() -> Made:
        from benchmarks.subject import start

        state, step, model = _model(preset, dtype, changes)
        token, cache = start(model, batch, slots)
        return step, (state, token, cache, jnp.int32(slots // 2))

    return make


def _greedy(make: Callable[[], Made], **about: Any) -> Case:
    """The next step has the token and the cache of this one."""
    return Case("decode", make, carried=(1, 2), take=lambda out: (out[0], out[2]), **about)


def _prefill(preset: str, tokens: int, dtype: Any, **changes: Any) -> Callable[[], Made]:
    def make() -> Made:
        from flax import nnx

        state, _, model = _model(preset, dtype, changes)
        graphdef = nnx.split(model)[0]
        run = lambda state, token, cache, pos: nnx.merge(graphdef, state)(token, cache, pos)
        token = i(model.config.vocab_size, 1, tokens)()
        return run, (state, token, model.init_cache(1, tokens), jnp.int32(0))

    return make


def _model(preset: str, dtype: Any, changes: Any) -> Any:
    from functools import partial

    from flax import nnx

    from models import registry
    from models.common.initialize import random_model
    from models.decode import greedy_step

    family, config = registry.preset(preset, **changes)
    model = random_model(family, config, dtype=dtype, seed=0)
    graphdef, state = nnx.split(model)
    return state, partial(greedy_step, graphdef), model


for _d, _t in (("f32", F32), ("bf16", BF16)):
    for _b in (1, 4, 8):
        CASES[f"qwen3-tiny {_d} batch {_b}"] = _greedy(_decode("qwen3-tiny", _b, 64, _t))
        CASES[f"qwen3-130m/4 {_d} batch {_b}"] = _greedy(_decode("qwen3-130m", _b, 256, _t, num_layers=4))
    CASES[f"qwen3-130m {_d} batch 1"] = _greedy(_decode("qwen3-130m", 1, 256, _t))
    CASES[f"llama-tiny {_d} batch 2"] = _greedy(_decode("llama-tiny", 2, 64, _t))
    CASES[f"qwen3-130m/2 {_d} prefill 128"] = Case("prefill", _prefill("qwen3-130m", 128, _t, num_layers=2))
    CASES[f"qwen3-tiny {_d} prefill 32"] = Case("prefill", _prefill("qwen3-tiny", 32, _t))
for _b in (1, 8):
    CASES[f"llama-3.2-1b bf16 batch {_b}"] = _greedy(_decode("llama-3.2-1b", _b, 1000, BF16), large=True)
    CASES[f"qwen3-0.6b bf16 batch {_b}"] = _greedy(_decode("qwen3-0.6b", _b, 1000, BF16), large=True)
CASES["qwen3-0.6b bf16 prefill 512"] = Case("prefill", _prefill("qwen3-0.6b", 512, BF16), large=True)
