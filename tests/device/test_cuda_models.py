"""Zoo models and every spelling of a decoder as megakernels on the GPU, within the numeric gate, also as sm_80 code."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_mpk
from benchmarks import decoders as spellings
from jax_mpk.backends.cuda import backend as cuda
from models import decode, registry

pytestmark = pytest.mark.device
SLOTS = 72
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
ARCHS = pytest.mark.parametrize("arch", ["", "sm_80"], ids=["own", "sm_80"])


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def gate(step, exact_step, args, logits: int, arch: str) -> None:
    """Element `logits` of the results: rms error against float32 at most 1.25 times that of `jax.jit`, and no element twice
    as far off as its worst; as close to the CPU executor; the others close."""
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(jax.jit(exact_step)(*wide(args))[logits], np.float64)
    xla = jax.jit(step)(*args)
    ours = jax.jit(jax_mpk.megakernelize(step, implementation="cuda", options={"arch": arch}))(*args)
    jax.block_until_ready(ours)
    cuda.check()
    size = np.sqrt(np.mean(exact**2))
    off = [np.abs(np.asarray(x[logits], np.float64) - exact) for x in (ours, xla)]
    rms = [np.sqrt(np.mean(x**2)) for x in off]
    assert rms[0] <= 1.25 * rms[1] + 1e-5 * size
    assert off[0].max() <= 2 * off[1].max() + 1e-5 * size
    cpu = jax.jit(jax_mpk.megakernelize(step, implementation="cpu"))(*jax.device_put(args, jax.devices("cpu")[0]))
    apart = np.asarray(cpu[logits], np.float64) - np.asarray(ours[logits], np.float64)
    assert np.sqrt(np.mean(apart**2)) <= 2 * rms[1] + 1e-5 * size, "the CPU executor gives something else"
    others = [[x for n, x in enumerate(r) if n != logits] for r in (ours, xla)]
    for a, b in zip(*map(jax.tree.leaves, others), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(
                a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.05 * max(1.0, size)
            )


@functools.cache
def loaded(name: str, dtype) -> tuple:
    model, _ = registry.load(name, dtype=dtype, seed=3)
    return (*nnx.split(model), model)


@ARCHS
@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@DTYPES
@pytest.mark.parametrize("name", ["qwen3-tiny", "llama-tiny"])
def test_models(name, dtype, batch, arch):
    graphdef, state, model = loaded(name, dtype)
    rng = np.random.default_rng(batch)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, dtype), model.init_cache(batch, SLOTS))
    tokens = jnp.asarray(rng.integers(0, 50, batch), jnp.int32)
    step, exact = (functools.partial(decode.greedy_step, loaded(name, t)[0]) for t in (dtype, jnp.float32))
    gate(step, exact, (state, tokens, cache, jnp.int32(41)), 1, arch)


def choices():
    """Every spelling of each part once, beside the first spellings of the others."""
    parts = {
        "norm": spellings.NORMS,
        "rope": spellings.ROPES,
        "update": spellings.UPDATES,
        "attend": spellings.ATTENTIONS,
    }
    first = {k: next(iter(v)) for k, v in parts.items()}
    return [first, *({**first, k: n} for k, v in parts.items() for n in list(v)[1:])]


@pytest.mark.parametrize("batch,arch", list(itertools.product([1, 3, 8, 16], ["", "sm_80"])))
@DTYPES
@pytest.mark.parametrize("how", choices(), ids=lambda c: "-".join(c.values()))
def test_spellings(how, dtype, batch, arch):
    shape = spellings.Shape()
    step = spellings.decoder(shape, **how)
    args = (
        spellings.weights(shape, dtype),
        jnp.arange(batch, dtype=jnp.int32) + 3,
        spellings.cache(shape, batch, dtype),
        jnp.int32(11),
    )
    gate(step, step, args, 1, arch)
