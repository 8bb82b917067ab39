"""The decoders against the NumPy reference, and the calling convention: cache, positions, prefill and decode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decode, registry
from models.common.initialize import random_model
from models.common.rope import frequencies
from models.llama import LlamaConfig
from models.qwen3 import Qwen3, Qwen3Config
from tests.models import hf_reference as reference

LENGTH = 80  # beyond the 64 positions of the reference's original context, so that rope scaling matters
SHAPES = {
    "llama-tied": reference.LLAMA,
    "llama-untied": reference.LLAMA | dict(tie_word_embeddings=False),
    "qwen3-tied": reference.QWEN3,
    "qwen3-untied": reference.QWEN3 | dict(tie_word_embeddings=False),
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tmp_path_factory):
    """A checkpoint, tokens ``[2, LENGTH]``, and the reference's logits."""
    hf = SHAPES[request.param]
    tensors = reference.random_tensors(hf)
    directory = reference.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), hf, tensors)
    tokens = np.random.default_rng(1).integers(0, hf["vocab_size"], (2, LENGTH)).astype(np.int32)
    return directory, tokens, reference.logits(hf, tensors, tokens)


def forward(model, tokens, cache, pos):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    return run(state, tokens, cache, np.int32(pos))


def error(found, expected):
    """Root mean square error in units of the expected values' own."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def test_float32_logits_match_the_reference(case):
    directory, tokens, expected = case
    model, _ = registry.load(None, checkpoint=directory, dtype=jnp.float32)
    logits, _ = forward(model, tokens, model.init_cache(2, LENGTH), 0)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-4)
    assert error(logits, expected) < 1e-5


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-untied"], indirect=True)
def test_bfloat16_logits_are_near_the_reference(case):
    directory, tokens, expected = case
    model, _ = registry.load(None, checkpoint=directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    logits, cache = forward(model, tokens, model.init_cache(2, LENGTH), 0)
    assert logits.dtype == jnp.float32 and cache[0]["k"].dtype == jnp.bfloat16
    assert error(logits, expected) < 0.03


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-untied"], indirect=True)
def test_prefill_in_blocks_then_decode_equals_full_forward(case):
    """Two blocks, the second padded, then one token at a time, in a cache that is longer than needed."""
    directory, tokens, expected = case
    model, _ = registry.load(None, checkpoint=directory, dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    cache = model.init_cache(2, 96)
    fill = jax.jit(partial(decode.prefill, graphdef))
    step = jax.jit(partial(decode.greedy_step, graphdef))
    prompt = 50
    padded = np.full((2, 64), 7, np.int32)
    padded[:, :prompt] = tokens[:, :prompt]
    _, cache = fill(state, padded[:, :32], cache, np.int32(0), np.int32(31))
    logits, cache = fill(state, padded[:, 32:], cache, np.int32(32), np.int32(prompt - 33))
    np.testing.assert_allclose(logits, expected[:, prompt - 1], atol=2e-4, rtol=1e-4)
    for pos in range(prompt, LENGTH):
        following, logits, cache = step(state, tokens[:, pos], cache, np.int32(pos))
        np.testing.assert_allclose(logits, expected[:, pos], atol=2e-4, rtol=1e-4)
        np.testing.assert_array_equal(following, np.argmax(expected[:, pos], axis=-1))
        assert following.dtype == jnp.int32


def test_the_cache_is_returned_and_not_changed():
    model = random_model(Qwen3, Qwen3Config.tiny(), dtype=jnp.float32)
    before = model.init_cache(2, 8)
    _, after = forward(model, jnp.ones((2, 3), jnp.int32), before, 4)
    assert len(after) == model.config.num_layers
    for old, new in zip(before, after, strict=True):
        for part in ("k", "v"):
            assert new[part].shape == (2, 8, model.config.num_kv_heads, model.config.head_dim)
            assert not np.any(old[part])
            written = np.any(np.asarray(new[part]), axis=(0, 2, 3))
            np.testing.assert_array_equal(written, np.isin(np.arange(8), [4, 5, 6]))


def test_sampling_depends_on_key_and_position_only():
    logits = jnp.log(jnp.array([[0.7, 0.3, 0.0]] * 4000))
    draws = decode.sample(logits, jax.random.key(0), 1.0)
    np.testing.assert_array_equal(draws, decode.sample(logits, jax.random.key(0), 1.0))
    assert abs(float(jnp.mean(draws == 0)) - 0.7) < 0.03 and not jnp.any(draws == 2)
    sharper = decode.sample(logits, jax.random.key(0), 0.2)
    assert float(jnp.mean(sharper == 0)) > 0.95

    model = random_model(Qwen3, Qwen3Config.tiny(num_layers=1), dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    step = jax.jit(partial(decode.sample_step, graphdef))
    args = state, jnp.zeros(64, jnp.int32), model.init_cache(64, 4)
    key = jax.random.key(0)
    for pos in (0, 1):
        token, logits, _ = step(*args, jnp.int32(pos), key, 1.0)
        np.testing.assert_array_equal(token, decode.sample(logits, jax.random.fold_in(key, pos), 1.0))


def test_rope_scaling_of_llama_3_2():
    """The published scaling: fast frequencies kept, slow ones divided by 32, the rest between."""
    config = LlamaConfig.llama_3_2_1b()
    plain = frequencies(config.replace(rope_scaling=None))
    ratio = frequencies(config) / plain
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 2048], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 32, rtol=1e-6)
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) and np.all((between > 1 / 32) & (between < 1))
    np.testing.assert_allclose(frequencies(config), reference.inverse_frequencies(config.to_hf()), rtol=1e-6)


def test_random_weights_are_scaled_seeded_and_of_the_asked_type():
    config = Qwen3Config.tiny(hidden_size=256, tie_embeddings=False)
    model = random_model(Qwen3, config, seed=3)
    kernel = np.asarray(model.layers[0].mlp.gate.kernel[...], np.float32)
    assert model.layers[0].mlp.gate.kernel[...].dtype == jnp.bfloat16
    assert abs(kernel.std() * np.sqrt(256) - 1) < 0.02 and abs(kernel.mean()) < 0.002
    assert np.all(np.asarray(model.norm.scale[...]) == 1)
    again, other = random_model(Qwen3, config, seed=3), random_model(Qwen3, config, seed=4)
    np.testing.assert_array_equal(kernel, np.asarray(again.layers[0].mlp.gate.kernel[...], np.float32))
    assert np.any(kernel != np.asarray(other.layers[0].mlp.gate.kernel[...], np.float32))
    assert np.any(kernel != np.asarray(model.layers[1].mlp.gate.kernel[...], np.float32))
