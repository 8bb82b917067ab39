"""Mamba-2 against the NumPy recurrence, its checkpoints, and a step and a prefill as one megakernel each."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mamba2
from models.common.errors import CheckpointError, ConfigError
from models.common.linen import describe
from models.mamba2 import Mamba2, Mamba2Config
from models.mamba2.ssm import many_steps, one_step
from models.mamba2.weights import load_config
from tests.models import mamba2_reference as reference
from tests.models.gate import ROUGHLY, assert_numeric_gate
from tests.models.hf_reference import write_checkpoint

HF = reference.MAMBA2
LENGTH = 21


@pytest.fixture(scope="module")
def tensors():
    return reference.random_tensors(HF)


@pytest.fixture(scope="module")
def loaded(tensors, tmp_path_factory):
    return mamba2.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("mamba2"), HF, tensors), dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, HF["vocab_size"], (3, LENGTH)).astype(np.int32)


def run(model, params, tokens, cache):
    return model.apply({"params": params}, tokens, cache)


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


# Numbers


def test_a_prefill_as_one_megakernel_and_steps_after_it_match_the_recurrence(loaded, tensors, tokens):
    """Thirteen positions by chunks, one of eight and part of another; the others one by one from the cache that the chunks left."""
    model, params = loaded
    exact, ends = reference.logits(HF, tensors, tokens)
    cache = mamba2.init_cache(model.config, 3, jnp.float32)
    halfway = reference.logits(HF, tensors, tokens[:, :13])
    found = assert_numeric_gate(partial(run, model), halfway, params, tokens[:, :13], cache)
    cache = jax.tree.unflatten(jax.tree.structure(cache), found[1:])
    step = jax.jit(partial(mamba2.greedy_step, model))
    for t in range(13, LENGTH):
        following, logits, cache = step(params, tokens[:, t], cache)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact[:, t], atol=2e-5)
        np.testing.assert_array_equal(following, np.argmax(exact[:, t], axis=-1))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), cache, ends)


@pytest.mark.parametrize("chunk", [4, 5, 99])
def test_chunks_of_any_size_are_the_same_as_steps(chunk):
    rng = np.random.default_rng(chunk)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    state, x, step = normal(2, 4, 3, 5), normal(2, 12, 4, 3), rng.uniform(0, 2, (2, 12, 4)).astype(np.float32)
    step[0, :, 0] = 60  # in which everything is forgotten: what is later must not become infinite
    rate, into, out = -rng.uniform(0.5, 4, 4).astype(np.float32), normal(2, 12, 2, 5), normal(2, 12, 2, 5)
    found, end = jax.jit(partial(many_steps, chunk=chunk))(state, x, step, rate, into, out)
    for t in range(12):
        y, state = one_step(state, x[:, t], step[:, t], rate, into[:, t], out[:, t])
        np.testing.assert_allclose(found[:, t], y, rtol=1e-5, atol=2e-4 if t else 1e-3)
    np.testing.assert_allclose(end, state, rtol=1e-5, atol=2e-4)


def test_without_biases_and_groups_and_with_a_tied_head(tmp_path, tokens):
    tensors = reference.random_tensors(reference.PLAIN)
    model, params = mamba2.from_pretrained(write_checkpoint(tmp_path, reference.PLAIN, tensors), dtype=jnp.float32)
    assert "head" not in params and "bias" not in params["mixer_0"]["conv"]
    found, _ = jax.jit(partial(run, model))(params, tokens[:, :7], mamba2.init_cache(model.config, 3, jnp.float32))
    np.testing.assert_allclose(found, reference.logits(reference.PLAIN, tensors, tokens[:, :7])[0], atol=2e-5)


# As one megakernel


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_step_as_one_megakernel_is_as_near_to_the_recurrence_as_jit(tmp_path, tensors, tokens, dtype):
    model, params = mamba2.from_pretrained(write_checkpoint(tmp_path, HF, tensors), dtype=dtype)
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    exact, ends = reference.logits(HF, stored, tokens)
    _, before = reference.logits(HF, stored, tokens[:, :-1])
    cache = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), before)
    cache = [layer | dict(conv=layer["conv"].astype(dtype)) for layer in cache]

    def step(params, token, cache):
        _, logits, cache = mamba2.greedy_step(model, params, token, cache)
        return logits, cache

    within = ROUGHLY if dtype == jnp.bfloat16 else 2e-5
    assert_numeric_gate(step, (exact[:, -1], ends), params, tokens[:, -1], cache, within=within)


# Checkpoints


def test_what_is_saved_loads_again(tmp_path):
    config = Mamba2Config.tiny(use_bias=True, step_range=(0.5, math.inf), wide_residual=False)
    model, params = mamba2.random_model(config, seed=5)
    mamba2.save_pretrained(model, params, tmp_path, max_file_bytes=10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, loaded = mamba2.from_pretrained(tmp_path)
    assert again.config == config
    assert_same(params, loaded)


def test_a_bare_infinity_is_read_where_it_was_long_written_and_nowhere_else(tmp_path):
    path = tmp_path / "config.json"
    text = json.dumps(HF | dict(time_step_limit=[0.0, math.inf]))
    assert "[0.0, Infinity]" in text
    path.write_text(text)
    assert load_config(tmp_path) == Mamba2Config.from_hf(HF).replace(step_range=(0.0, math.inf))
    for change in (dict(time_step_limit=[math.inf, 0.0]), dict(layer_norm_epsilon=math.inf)):
        path.write_text(json.dumps(HF | change))
        with pytest.raises(CheckpointError, match="Infinity is no number of JSON"):
            load_config(tmp_path)
    with pytest.raises(CheckpointError, match="there is no directory"):
        load_config(tmp_path / "nowhere")


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path, tensors):
    gone, flipped = "backbone.layers.1.mixer.A_log", "backbone.layers.0.mixer.conv1d.weight"
    changed = {name: value for name, value in tensors.items() if name != gone}
    changed |= {flipped: np.ascontiguousarray(tensors[flipped].T), "strange": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError) as caught:
        mamba2.from_pretrained(write_checkpoint(tmp_path, HF, changed))
    assert caught.value.missing == [gone] and caught.value.unexpected == ["strange"]
    assert caught.value.misshapen == [f"{flipped} (found [4, 1, 96], expected [96, 1, 4])"]


def test_random_parameters_start_with_the_published_steps_and_rates():
    _, params = mamba2.random_model(Mamba2Config.tiny(), dtype=jnp.float32)
    mixer = params["mixer_0"]
    np.testing.assert_allclose(jax.nn.softplus(mixer["step_bias"])[jnp.array([0, -1])], [1e-3, 0.1], rtol=1e-4)
    np.testing.assert_allclose(jnp.exp(mixer["log_rate"]), [1, 2, 3, 4], rtol=1e-6)


# Configurations


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(model_type="mamba"), "'model_type' is 'mamba', expected 'mamba2'"),
        (dict(hidden_act="gelu"), "'hidden_act' is 'gelu', expected 'silu' or 'swish'"),
        (dict(rms_norm=False), "'rms_norm' is false, expected true"),
        (dict(quantization_config={}), "'quantization_config' is {}"),
        (dict(head_dim=8), "4 heads of 8 features are 32, expected expand times hidden_size, which is 64"),
        (dict(n_groups=3), "4 heads cannot share 3 groups evenly"),
        (dict(state_size=None), "'state_size' is missing, expected an integer"),
        (dict(conv_kernel=1), "'conv_kernel' is 1, expected an integer from 2"),
        *(
            (dict(time_step_limit=value), "expected a list of two numbers from 0")
            for value in ([0.1], [0.2, 0.1], [-1, 1], [True, 2], "ab", [0, "Infinity"], [math.nan, 1], [0, 10**400], 3)
        ),
    ],
)
def test_what_is_not_supported_is_refused(change, complaint):
    with pytest.raises(ConfigError) as caught:
        Mamba2Config.from_hf(HF | change, where="dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ") and complaint in str(caught.value)


@pytest.mark.parametrize("name", mamba2.PRESETS)
def test_presets_survive_config_json_and_have_their_published_size(name):
    config = mamba2.PRESETS[name]()
    assert Mamba2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(mamba2.PRESETS[name]())
    if name == "mamba2-130m":
        cache = jax.eval_shape(lambda: mamba2.init_cache(config, 1))
        leaves = describe(Mamba2(config), jax.ShapeDtypeStruct((1, 1), jnp.int32), cache).values()
        assert sum(leaf.size for leaf in leaves) == 128_989_632
