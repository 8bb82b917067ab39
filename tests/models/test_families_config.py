"""Configurations and checkpoints of the families beyond Llama and Qwen3: published ones, refused ones, saved ones."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from models import gpt2, mistral, qwen2, registry
from models.common.errors import CheckpointError, ConfigError
from models.common.initialize import random_model
from tests.models import families_reference as reference
from tests.models.hf_reference import write_checkpoint
from tests.models.test_models_weights import assert_same

FAMILIES = {"gpt2": gpt2, "mistral": mistral, "qwen2": qwen2}

_COMMON = dict(bos_token_id=1, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True, attention_dropout=0.0)
PUBLISHED = {
    "gpt2": dict(
        activation_function="gelu_new",
        architectures=["GPT2LMHeadModel"],
        attn_pdrop=0.1,
        bos_token_id=50256,
        eos_token_id=50256,
        layer_norm_epsilon=1e-05,
        model_type="gpt2",
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        summary_type="cls_index",
        vocab_size=50257,
    ),
    "mistral-7b": _COMMON
    | dict(
        architectures=["MistralForCausalLM"],
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        model_type="mistral",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=32768,
    ),
    "qwen2.5-0.5b": _COMMON
    | dict(
        architectures=["Qwen2ForCausalLM"],
        eos_token_id=[151645, 151643],
        hidden_act="silu",
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=21,
        model_type="qwen2",
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
}
"""What the ``config.json`` of such a model says, with what does not change numbers."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name):
    family, preset = registry.PRESETS[name]
    assert registry.FAMILIES[family].config.from_hf(PUBLISHED[name]) == preset()


@pytest.mark.parametrize(
    ("base", "change", "fragment"),
    [
        (reference.MISTRAL, dict(sliding_window=0), "'sliding_window' is 0, expected null, or an integer from 1 to"),
        (reference.MISTRAL, dict(sliding_window=True), "'sliding_window' is true, expected null, or an integer"),
        (reference.MISTRAL, dict(hidden_act="gelu"), "'hidden_act' is 'gelu', expected 'silu'"),
        (reference.MISTRAL, dict(layer_types=["sliding_attention"] * 2), "'layer_types' is ['sliding_attention'"),
        (reference.MISTRAL, dict(model_type="ministral"), "'model_type' is 'ministral', expected 'mistral'"),
        (reference.GPT2, dict(n_embd=50), "hidden_size is 50, expected a multiple of 6 heads"),
        (reference.GPT2, dict(n_embd=None), "'n_embd' is missing, expected an integer from 1"),
        (reference.GPT2, dict(n_inner=0), "'n_inner' is 0, expected an integer from 1"),
        (reference.GPT2, dict(activation_function="gelu"), "'activation_function' is 'gelu', expected 'gelu_new'"),
        (reference.GPT2, dict(scale_attn_weights=False), "'scale_attn_weights' is false, expected true"),
        (reference.GPT2, dict(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' is true"),
        (reference.GPT2, dict(add_cross_attention=True), "'add_cross_attention' is true, expected false"),
        (reference.QWEN2, dict(use_sliding_window=True), "'use_sliding_window' is true, expected false"),
        (reference.QWEN2, dict(rope_scaling=dict(type="yarn", factor=4.0)), "'rope_scaling.type' is 'yarn'"),
        (reference.QWEN2, dict(attention_bias=False), "'attention_bias' is false, expected true"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_what_is_not_supported_is_refused(base, change, fragment):
    with pytest.raises(ConfigError) as caught:
        registry.FAMILIES[base["model_type"]].config.from_hf(base | change)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(("base", "key"), [(reference.MISTRAL, "sliding_window")])
def test_null_is_not_absent_where_other_readers_take_a_number(base, key):
    config = registry.FAMILIES[base["model_type"]].config
    assert config.from_hf(base | {key: None}).to_hf()[key] is None
    with pytest.raises(ConfigError, match=f"'{key}' is missing, expected null, or"):
        config.from_hf({name: value for name, value in base.items() if name != key})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_loads_again(tmp_path, name, tied):
    """Also in several files, and by name; nothing of the configuration gets lost."""
    family, entry = FAMILIES[name], registry.FAMILIES[name]
    config = entry.config.tiny(tie_embeddings=tied, eos_token_ids=(3, 4))
    model = random_model(entry.model, config)
    family.save_pretrained(model, tmp_path, max_file_bytes=5 << 30 if tied else 30_000)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (not tied)
    loaded, found = registry.load(None, checkpoint=tmp_path)
    assert found == loaded.config == config and json.loads((tmp_path / "config.json").read_text())["torch_dtype"]
    assert_same(model, loaded)
    assert loaded.dtype == jnp.bfloat16


def test_gpt2_checkpoints_with_and_without_prefix_head_and_stored_masks_are_the_same(tmp_path):
    hf, tensors = reference.GPT2, reference.random_tensors(reference.GPT2)
    plain, _ = registry.load(None, checkpoint=write_checkpoint(tmp_path / "plain", hf, tensors))
    masks = {f"h.{index}.attn.bias": np.ones((1, 1, 30, 30), np.float32) for index in range(2)}
    full = {f"transformer.{name}": value for name, value in (tensors | masks).items()}
    full["lm_head.weight"] = tensors["wte.weight"].copy()
    assert_same(plain, registry.load(None, checkpoint=write_checkpoint(tmp_path / "full", hf, full))[0])
    assert_same(plain, registry.load(None, checkpoint=write_checkpoint(tmp_path / "masks", hf, tensors | masks))[0])
    del full["transformer.ln_f.bias"]
    with pytest.raises(CheckpointError) as caught:
        registry.load(None, checkpoint=write_checkpoint(tmp_path / "missing", hf, full))
    assert caught.value.missing == ["transformer.ln_f.bias"] and not caught.value.unexpected
