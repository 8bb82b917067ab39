"""Checkpoints and tokenizers: what loads, and the one error that says everything that is wrong."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from models import llama, qwen3, registry
from models.common.checkpoint import CheckpointError
from models.common.errors import ConfigError
from models.common.initialize import abstract_model, random_model
from models.common.rotary import Llama3RopeScaling
from models.common.tokenizer import StreamDecoder, TokenizerError, check_vocabulary, load_tokenizer
from tests.models import hf_reference as reference

QWEN3 = reference.QWEN3 | dict(num_hidden_layers=2)
UNTIED = QWEN3 | dict(tie_word_embeddings=False)
GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.layers.1.self_attn.q_norm.weight"


def leaves(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(one, two):
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for path, value in one.items():
        assert value.dtype == two[path].dtype
        np.testing.assert_array_equal(value, two[path], err_msg=str(path))


@pytest.fixture
def tensors():
    return reference.random_tensors(QWEN3)


def failure(directory):
    with pytest.raises(CheckpointError) as caught:
        registry.load(None, checkpoint=directory)
    assert str(directory) in str(caught.value)
    return caught.value


# What loads


def test_parameters_are_the_tensors_transposed(tmp_path, tensors):
    directory = reference.write_checkpoint(tmp_path, QWEN3, tensors)
    model, config = registry.load(None, checkpoint=directory, dtype=jnp.float32)
    assert isinstance(model, qwen3.Qwen3) and config == model.config == qwen3.Qwen3Config.from_hf(QWEN3)
    np.testing.assert_array_equal(model.layers[0].mlp.gate.kernel[...], tensors[GATE].T)
    np.testing.assert_array_equal(model.layers[1].attention.q_norm.scale[...], tensors[NORM])
    np.testing.assert_array_equal(model.embed.embedding[...], tensors["model.embed_tokens.weight"])
    assert sum(value.size for value in leaves(model).values()) == sum(value.size for value in tensors.values())


def test_shards_equal_a_single_file(tmp_path, tensors):
    single = reference.write_checkpoint(tmp_path / "single", QWEN3, tensors)
    sharded = reference.write_checkpoint(tmp_path / "sharded", QWEN3, tensors, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert_same(registry.load(None, checkpoint=single)[0], registry.load(None, checkpoint=sharded)[0])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_stored_types_are_converted(tmp_path, tensors, stored, wanted):
    tensors = {name: value.astype(stored) for name, value in tensors.items()}
    model, _ = registry.load(None, checkpoint=reference.write_checkpoint(tmp_path, QWEN3, tensors), dtype=wanted)
    found = model.layers[0].mlp.gate.kernel[...]
    assert found.dtype == wanted and model.init_cache(1, 4)[0]["k"].dtype == wanted
    np.testing.assert_array_equal(found, tensors[GATE].T.astype(wanted))


def test_a_tied_model_ignores_a_stored_head_and_an_untied_one_needs_it(tmp_path):
    tensors = reference.random_tensors(UNTIED)
    tied, _ = registry.load(None, checkpoint=reference.write_checkpoint(tmp_path / "tied", QWEN3, tensors))
    assert not hasattr(tied, "head")
    untied, _ = registry.load(None, checkpoint=reference.write_checkpoint(tmp_path / "untied", UNTIED, tensors))
    assert untied.head.kernel[...].shape == (UNTIED["hidden_size"], UNTIED["vocab_size"])
    del tensors["lm_head.weight"]
    error = failure(reference.write_checkpoint(tmp_path / "none", UNTIED, tensors))
    assert error.missing == ["lm_head.weight"]


@pytest.mark.parametrize("family", [llama, qwen3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("limit", [5 << 30, 30_000], ids=["single", "sharded"])
def test_what_is_saved_loads_again(tmp_path, family, limit):
    model_class, config_class = (
        (llama.Llama, llama.LlamaConfig) if family is llama else (qwen3.Qwen3, qwen3.Qwen3Config)
    )
    model = random_model(model_class, config_class.tiny(tie_embeddings=False, eos_token_ids=(3, 4)))
    family.save_pretrained(model, tmp_path, max_file_bytes=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit < 1 << 30)
    loaded = family.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_saving_can_change_the_type(tmp_path):
    model = random_model(qwen3.Qwen3, qwen3.Qwen3Config.tiny(), dtype=jnp.float32)
    qwen3.save_pretrained(model, tmp_path, dtype=jnp.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.get_slice(GATE).get_dtype() == "BF16"
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


# What does not


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path, tensors):
    del tensors[NORM]
    tensors["model.layers.2.mlp.gate_proj.weight"] = tensors[GATE]
    tensors[GATE] = np.ascontiguousarray(tensors[GATE].T)
    error = failure(reference.write_checkpoint(tmp_path, QWEN3, tensors))
    assert error.missing == [NORM]
    assert error.unexpected == ["model.layers.2.mlp.gate_proj.weight"]
    assert error.misshapen == [f"{GATE} (found [48, 80], expected [80, 48])"]
    assert error.corrupt == []
    for name in (NORM, *error.unexpected, GATE):
        assert name in str(error)


def test_an_integer_tensor_is_refused(tmp_path, tensors):
    tensors[GATE] = tensors[GATE].astype(np.int8)
    error = failure(reference.write_checkpoint(tmp_path, QWEN3, tensors))
    assert len(error.misshapen) == 1 and GATE in error.misshapen[0] and "I8" in error.misshapen[0]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_damaged_file_is_named(tmp_path, tensors, damage, shards):
    directory = reference.write_checkpoint(tmp_path, QWEN3, tensors, shards)
    file = sorted(directory.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-5], "garbage": b"\xff" * 64, "empty": b""}[damage])
    error = failure(directory)
    assert len(error.corrupt) == 1 and file.name in error.corrupt[0]


def test_a_damaged_index_or_config_is_named(tmp_path, tensors):
    directory = reference.write_checkpoint(tmp_path, QWEN3, tensors, shards=2)
    index = directory / "model.safetensors.index.json"
    for content in ("{", "{}"):
        index.write_text(content)
        assert index.name in failure(directory).corrupt[0]
    (directory / "config.json").write_text("{")
    assert "config.json" in failure(directory).corrupt[0]
    assert "config.json" in failure(tmp_path / "nowhere").corrupt[0]


def test_long_lists_are_shortened_in_the_message_only(tmp_path):
    error = failure(reference.write_checkpoint(tmp_path, QWEN3, {"other": np.ones(1, np.float32)}))
    assert len(error.missing) == 24 and error.unexpected == ["other"]
    assert "and 16 more" in str(error)


# Configurations and names


def test_published_configurations_are_the_presets():
    llama_1b = dict(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=32.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        vocab_size=128256,
    )
    assert llama.LlamaConfig.from_hf(llama_1b) == llama.LlamaConfig.llama_3_2_1b()
    newer = llama_1b | dict(rope_parameters=llama_1b["rope_scaling"] | dict(rope_theta=500000.0))
    del newer["rope_scaling"], newer["rope_theta"]
    assert llama.LlamaConfig.from_hf(newer) == llama.LlamaConfig.llama_3_2_1b()

    qwen3_8b = dict(
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=12288,
        max_position_embeddings=40960,
        max_window_layers=36,
        model_type="qwen3",
        num_attention_heads=32,
        num_hidden_layers=36,
        num_key_value_heads=8,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=151936,
    )
    config = qwen3.Qwen3Config.from_hf(qwen3_8b)
    assert config == qwen3.Qwen3Config.qwen3_8b().replace(eos_token_ids=(151645,))


@pytest.mark.parametrize("name", registry.PRESETS)
def test_presets_survive_config_json_and_have_their_published_size(name):
    family, preset = registry.PRESETS[name]
    config = preset()
    assert type(config).from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(preset())
    model = abstract_model(registry.FAMILIES[family].model, config, jnp.bfloat16)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)) if leaf.ndim >= 2)
    assert matrices == config.num_parameters
    published = {
        "gemma-2-2b": 2.61e9,
        "gemma-3-1b": 1.0e9,
        "gpt2": 0.124e9,
        "gpt2-medium": 0.355e9,
        "llama-3.2-1b": 1.24e9,
        "llama-3.2-3b": 3.21e9,
        "mistral-7b": 7.25e9,
        "qwen2.5-0.5b": 0.494e9,
        "qwen2.5-1.5b": 1.54e9,
        "qwen2.5-7b": 7.62e9,
        "qwen3-130m": 0.13e9,
        "qwen3-30b-a3b": 30.5e9,
        "qwen3-0.6b": 0.6e9,
        "qwen3-1.7b": 1.72e9,
        "qwen3-4b": 4.02e9,
        "qwen3-8b": 8.19e9,
    }
    if name in published:
        assert abs(matrices / published[name] - 1) < 0.015


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(model_type="llama"), "model_type"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "low_freq_factor"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(num_key_value_heads=4), "6 query heads"),
    ],
)
def test_what_is_not_supported_is_refused(change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        qwen3.Qwen3Config.from_hf(QWEN3 | change)


def test_configurations_are_frozen():
    config = llama.LlamaConfig.tiny()
    assert isinstance(config.rope_scaling, Llama3RopeScaling)
    with pytest.raises(AttributeError):
        config.hidden_size = 1


def test_registry_refuses_what_makes_no_sense(tmp_path, tensors):
    directory = reference.write_checkpoint(tmp_path, QWEN3, tensors)
    with pytest.raises(ConfigError, match="no model is called"):
        registry.load("gpt-5")
    with pytest.raises(ConfigError, match="not both"):
        registry.load("qwen3-tiny", seed=0, checkpoint=directory)
    with pytest.raises(ConfigError, match="without a name"):
        registry.load(None, seed=0)
    with pytest.raises(ConfigError, match="not qwen3-tiny: its hidden_size is 48, not 64"):
        registry.load("qwen3-tiny", checkpoint=directory)
    with pytest.raises(ConfigError, match="'model_type' is 'qwen3', expected 'llama'"):
        registry.load("llama-tiny", checkpoint=directory)
    directory = reference.write_checkpoint(tmp_path, QWEN3 | dict(model_type="mamba"), tensors)
    with pytest.raises(ConfigError, match="mamba"):
        registry.load(None, checkpoint=directory)


# Tokenizers


def test_the_demo_tokenizer_round_trips_any_text():
    tokenizer = load_tokenizer(registry.DEMO)
    for text in ("It is a truth universally acknowledged,\nthat", "naïve £5 — 東京 \U0001f40d", "  two  spaces "):
        ids = tokenizer.encode(text).ids
        assert max(ids) < 1536 and tokenizer.decode(ids) == text


def test_streamed_text_equals_decoded_text_and_holds_back_half_characters():
    tokenizer = load_tokenizer(registry.DEMO)
    text = "She said £5 — 東京 \U0001f40d naïve."
    stream, pieces = StreamDecoder(tokenizer), []
    for token in tokenizer.encode(text).ids:
        pieces.append(stream.push(token))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "" in pieces, "some token must end inside a character for this test to mean anything"
    assert "".join(pieces) + stream.flush() == text


def test_a_stream_that_ends_inside_a_character_says_so():
    tokenizer = load_tokenizer(registry.DEMO)
    first, *rest = tokenizer.encode("東").ids
    assert rest
    stream = StreamDecoder(tokenizer)
    assert stream.push(first) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match="there is no"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    check_vocabulary(load_tokenizer(tmp_path), 256)
    with pytest.raises(TokenizerError, match="token 255, but the model's vocabulary ends at 99"):
        check_vocabulary(load_tokenizer(tmp_path), 100)
