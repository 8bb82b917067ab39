"""Whisper against the NumPy reference, its checkpoints, and as one megakernel; its steps too."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jax_mpk
from models import whisper
from models.common.errors import CheckpointError, ConfigError, UsageError
from models.common.initialize import abstract_model, random_model
from models.whisper import Whisper, WhisperConfig
from tests.models import whisper_reference as reference
from tests.models.gate import ROUGHLY, assert_numeric_gate
from tests.models.hf_reference import write_checkpoint

HF = reference.WHISPER
LENGTH = 9


@pytest.fixture(scope="module")
def tensors():
    return reference.random_tensors(HF)


@pytest.fixture(scope="module")
def model(tensors, tmp_path_factory):
    return whisper.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("whisper"), HF, tensors))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(2, 24, HF["num_mel_bins"])).astype(np.float32)
    return features, rng.integers(3, HF["vocab_size"], (2, LENGTH)).astype(np.int32)


def hear(model, features, tokens):
    """What is heard, and the cache and the logits after ``tokens``."""
    encoded = model.encode(features)
    logits, cache = model(tokens, model.init_cache(encoded, LENGTH + 2), jnp.int32(0))
    return encoded, logits, cache


# Numbers


def test_encoder_prefill_and_steps_match_the_reference(model, tensors, inputs):
    features, tokens = inputs
    sound, exact = reference.run(HF, tensors, features, tokens)
    graphdef, state = nnx.split(model)
    found, logits, cache = jax.jit(hear)(model, features, tokens[:, :5])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(found, sound, atol=2e-5)
    np.testing.assert_allclose(logits, exact[:, :5], atol=3e-5)
    step = jax.jit(partial(whisper.greedy_step, graphdef))
    for pos in range(5, LENGTH):
        following, logits, cache = step(state, tokens[:, pos], cache, np.int32(pos))
        np.testing.assert_allclose(logits, exact[:, pos], atol=3e-5)
        np.testing.assert_array_equal(following, np.argmax(exact[:, pos], axis=-1))


def test_a_transcription_by_megakernels_is_the_likeliest_token_after_each(model, tensors, inputs):
    features, _ = inputs
    wrap = partial(jax_mpk.megakernelize, implementation="cpu")
    found = whisper.transcribe(model, features, prompt=[7, 9], max_new_tokens=12, wrap=wrap)
    tokens = np.tile([[1, 7, 9]], (2, 1))
    for _ in range(found.shape[1]):
        following = np.argmax(reference.run(HF, tensors, features, tokens)[1][:, -1], axis=-1)
        tokens = np.concatenate([tokens, following[:, None]], axis=1)
    np.testing.assert_array_equal(found, tokens[:, 3:])
    assert found.shape == (2, 12) and len(np.unique(found)) > 6 and np.any(found[0] != found[1])


def test_a_text_ends_with_the_end_token(inputs):
    """A model to which, whatever it hears, one token is the likeliest: the end."""
    model = random_model(Whisper, WhisperConfig.tiny(decoder_layers=1), dtype=jnp.float32)
    model.decoder.norm.scale[...] = jnp.zeros(48)
    model.decoder.norm.bias[...] = model.decoder.words.embedding[...][2] * 10
    np.testing.assert_array_equal(whisper.transcribe(model, inputs[0], max_new_tokens=5), [[2], [2]])
    assert whisper.transcribe(model, inputs[0], max_new_tokens=0).shape == (2, 0)


def test_what_cannot_be_transcribed_is_refused(model, inputs):
    features, _ = inputs
    with pytest.raises(UsageError, match="2 tokens and 23 new ones exceed the context of 24"):
        whisper.transcribe(model, features, prompt=[7], max_new_tokens=23)
    with pytest.raises(UsageError, match=r"the features are \[2, 24, 9\], expected \[batch, 24, 10\]"):
        whisper.transcribe(model, features[:, :, :9], max_new_tokens=2)


# As one megakernel


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_all_of_it_as_one_megakernel_is_as_near_to_the_reference_as_jit(tmp_path, tensors, inputs, dtype):
    features, tokens = inputs
    features = features.astype(dtype)
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    graphdef, state = nnx.split(whisper.from_pretrained(write_checkpoint(tmp_path, HF, tensors), dtype=dtype))
    exact = reference.run(HF, stored, features.astype(np.float64), tokens[:, :1])

    def first(state, features, tokens):
        return hear(nnx.merge(graphdef, state), features, tokens)[:2]

    within = ROUGHLY if dtype == jnp.bfloat16 else 2e-5
    found = assert_numeric_gate(first, exact, state, features, tokens[:, :1], within=within)
    assert found[0].dtype == dtype and found[1].dtype == np.float32


# Checkpoints


def test_what_is_saved_loads_again_in_the_layouts_of_hugging_face(tmp_path, model, tensors):
    whisper.save_pretrained(model, tmp_path, max_file_bytes=30_000)
    files = list(tmp_path.glob("*.safetensors"))
    saved = {name: value for file in files for name, value in load_file(file).items()}
    assert len(files) > 1 and saved.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    loaded = whisper.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for one, two in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, loaded)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path, tensors):
    gone, flipped = "model.decoder.layers.1.encoder_attn.v_proj.bias", "model.encoder.conv1.weight"
    changed = {name: value for name, value in tensors.items() if name != gone}
    changed |= {flipped: np.ascontiguousarray(tensors[flipped].T), "strange": np.ones(1, np.float32)}
    changed["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]  # the tied head, which may be there
    with pytest.raises(CheckpointError) as caught:
        whisper.from_pretrained(write_checkpoint(tmp_path, HF, changed))
    assert caught.value.missing == [gone] and caught.value.unexpected == ["strange"]
    assert caught.value.misshapen == [f"{flipped} (found [3, 10, 48], expected [48, 10, 3])"]


# Configurations


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(model_type="speech_to_text"), "'model_type' is 'speech_to_text', expected 'whisper'"),
        (dict(activation_function="relu"), "'activation_function' is 'relu', expected 'gelu'"),
        (dict(scale_embedding=True), "'scale_embedding' is true"),
        (dict(tie_word_embeddings=False), "'tie_word_embeddings' is false"),
        (dict(quantization_config={}), "'quantization_config' is {}"),
        (dict(encoder_attention_heads=5), "48 features cannot be dealt out to 5 heads"),
        (dict(decoder_attention_heads=7), "48 features cannot be dealt out to 7 heads"),
        (dict(eos_token_id=96), "eos_token_id is 96, expected less than vocab_size, which is 96"),
        (dict(decoder_layers=None), "'decoder_layers' is missing, expected an integer"),
        (dict(d_model=49), "'d_model' is 49, expected an integer"),
    ],
)
def test_what_is_not_supported_is_refused(change, complaint):
    with pytest.raises(ConfigError) as caught:
        WhisperConfig.from_hf(HF | change, where="dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ") and complaint in str(caught.value)


@pytest.mark.parametrize("name", whisper.PRESETS)
def test_presets_survive_config_json_and_have_their_published_size(name):
    config = whisper.PRESETS[name]()
    assert WhisperConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(whisper.PRESETS[name]())
    leaves = jax.tree.leaves(nnx.state(abstract_model(Whisper, config, jnp.float32)))
    if name == "whisper-tiny":
        assert sum(leaf.size for leaf in leaves) == 37_760_640
