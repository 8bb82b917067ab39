"""Zoo models as megakernels on the CPU: the numeric gate, equal tokens, equal text, equal bits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_mpk
from jax_mpk.ir.graph import Attention
from models import decode, registry
from tests.execute import Runner

SLOTS = 72
NAMES = ["qwen3-tiny", "llama-tiny"]


@functools.cache
def loaded(name: str, dtype) -> tuple:
    """graphdef, state and the model itself."""
    model, _ = registry.load(name, dtype=dtype, seed=3)
    return (*nnx.split(model), model)


def step_of(name: str, dtype):
    graphdef, state, model = loaded(name, dtype)
    return functools.partial(decode.greedy_step, graphdef), state, model


def filled_cache(model, batch: int, dtype, seed: int = 0):
    """A cache that already holds something everywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, dtype), model.init_cache(batch, SLOTS))


def as_f32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_numeric_gate(name, dtype, batch):
    """The error against a float32 reference is at most 1.25 times that of jax.jit on the same inputs."""
    step, state, model = step_of(name, dtype)
    rng = np.random.default_rng(batch)
    tokens = jnp.asarray(rng.integers(0, 50, batch), jnp.int32)
    cache, pos = filled_cache(model, batch, dtype), jnp.int32(41)
    graphdef32 = loaded(name, jnp.float32)[0]
    with jax.default_matmul_precision("highest"):
        _, exact, _ = jax.jit(functools.partial(decode.greedy_step, graphdef32))(
            as_f32(state), tokens, as_f32(cache), pos
        )
    _, xla, want_cache = jax.jit(step)(state, tokens, cache, pos)
    next_, ours, new_cache = jax.jit(jax_mpk.megakernelize(step, implementation="cpu"))(state, tokens, cache, pos)

    def error(x):
        return float(jnp.sqrt(jnp.mean((x - exact) ** 2)))

    scale = float(jnp.sqrt(jnp.mean(exact**2)))
    assert error(ours) <= 1.25 * error(xla) + 2e-6 * scale
    np.testing.assert_array_equal(next_, jnp.argmax(ours, -1))
    for a, b in zip(jax.tree.leaves(new_cache), jax.tree.leaves(want_cache), strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05 if dtype == jnp.bfloat16 else 1e-4
        )
        # Everything but the new row is exactly what it was.
        rest = np.arange(SLOTS) != 41
        np.testing.assert_array_equal(np.asarray(a)[:, rest].view(np.uint8), np.asarray(b)[:, rest].view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_identical_over_64_steps(name):
    step, state, model = step_of(name, jnp.float32)

    def decode64(step, state, tokens, cache):
        def body(i, carry):
            token, cache, out = carry
            token, _, cache = step(state, token, cache, i)
            return token, cache, out.at[i].set(token)

        return jax.lax.fori_loop(0, 64, body, (tokens, cache, jnp.zeros((64, 2), jnp.int32)))[2]

    tokens = jnp.array([3, 11], jnp.int32)
    want = jax.jit(functools.partial(decode64, step))(state, tokens, model.init_cache(2, SLOTS))
    ours = jax.jit(functools.partial(decode64, jax_mpk.megakernelize(step, implementation="cpu")))
    got = ours(state, tokens, model.init_cache(2, SLOTS))
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(want)) > 4, "a decode that repeats one token tests nothing"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_any_threads_in_any_legal_order(name, dtype):
    step, state, model = step_of(name, dtype)
    cache = filled_cache(model, 3, dtype)
    runner = Runner(step, state, jnp.array([1, 2, 3], jnp.int32), cache, jnp.int32(40))
    assert any(isinstance(op, Attention) and op.appends for op in runner.compiled.stages["refine"].ops)
    want = [x.reshape(-1).view(np.uint8) for x in runner(threads=1)]
    for how in [dict(threads=t) for t in (1, 2, 3, 8)] + [dict(seed=s) for s in range(50)]:
        for a, b in zip(runner(**how), want, strict=True):
            np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b, err_msg=str(how))


def test_a_batch_row_does_not_depend_on_its_neighbours():
    step, state, model = step_of("qwen3-tiny", jnp.bfloat16)
    f = jax.jit(jax_mpk.megakernelize(step, implementation="cpu"))
    cache = filled_cache(model, 8, jnp.bfloat16)
    tokens = jnp.arange(8, dtype=jnp.int32)
    _, whole, _ = f(state, tokens, cache, jnp.int32(20))
    for row in (0, 5):
        one = jax.tree.map(lambda x: x[row : row + 1], cache)  # noqa: B023
        _, alone, _ = f(state, tokens[row : row + 1], one, jnp.int32(20))
        np.testing.assert_array_equal(np.asarray(alone)[0], np.asarray(whole)[row])


def test_the_shipped_model_writes_the_same_text():
    """Greedy text of the demo checkpoint, with and without megakernelize."""
    model, _ = registry.load("demo", dtype=jnp.bfloat16)
    graphdef, state = nnx.split(model)
    step = functools.partial(decode.greedy_step, graphdef)

    def text(step):
        step = jax.jit(step, donate_argnums=2)
        token, cache, out = jnp.array([17], jnp.int32), model.init_cache(1, 80), []
        for i in range(64):
            token, _, cache = step(state, token, cache, jnp.int32(i))
            out.append(int(token[0]))
        return out

    ours = text(jax_mpk.megakernelize(step, implementation="cpu"))
    assert ours == text(step)
    assert len(set(ours)) > 8
