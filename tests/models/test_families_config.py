"""Configurations and checkpoints of the families beyond Llama and Qwen3: published ones, refused ones, saved ones."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from models import gemma2, gemma3, gpt2, mistral, qwen2, qwen3_moe, registry
from models.common.errors import CheckpointError, ConfigError
from models.common.initialize import random_model
from models.common.local_global import GLOBAL, LOCAL
from tests.models import families_reference as reference
from tests.models.hf_reference import LLAMA, write_checkpoint
from tests.models.test_models_weights import assert_same

FAMILIES = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3_moe": qwen3_moe,
}

_COMMON = dict(bos_token_id=1, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True, attention_dropout=0.0)
PUBLISHED = {
    "gemma-2-2b": _COMMON
    | dict(
        architectures=["Gemma2ForCausalLM"],
        attention_bias=False,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        eos_token_id=1,
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=2304,
        intermediate_size=9216,
        max_position_embeddings=8192,
        model_type="gemma2",
        num_attention_heads=8,
        num_hidden_layers=26,
        num_key_value_heads=4,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
        sliding_window=4096,
        vocab_size=256000,
    ),
    "gemma-3-1b": _COMMON
    | dict(
        architectures=["Gemma3ForCausalLM"],
        attention_bias=False,
        attn_logit_softcapping=None,
        cache_implementation="hybrid",
        eos_token_id=[1, 106],
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=1152,
        intermediate_size=6912,
        max_position_embeddings=32768,
        model_type="gemma3_text",
        num_attention_heads=4,
        num_hidden_layers=26,
        num_key_value_heads=1,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
        vocab_size=262144,
    ),
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
    "qwen3-30b-a3b": _COMMON
    | dict(
        architectures=["Qwen3MoeForCausalLM"],
        attention_bias=False,
        decoder_sparse_step=1,
        eos_token_id=[151645, 151643],
        head_dim=128,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=6144,
        max_position_embeddings=40960,
        max_window_layers=48,
        mlp_only_layers=[],
        model_type="qwen3_moe",
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_key_value_heads=4,
        output_router_logits=False,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        tie_word_embeddings=False,
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
        (
            reference.GEMMA2,
            dict(hidden_activation="gelu"),
            "'hidden_activation' is 'gelu', expected 'gelu_pytorch_tanh'",
        ),
        (reference.GEMMA2, dict(sliding_window=None), "'sliding_window' is missing, expected an integer from 1"),
        (reference.GEMMA2, dict(query_pre_attn_scalar=None), "'query_pre_attn_scalar' is missing, expected an integer"),
        (reference.GEMMA2, dict(attn_logit_softcapping=0), "'attn_logit_softcapping' is 0, expected null, or a number"),
        (reference.GEMMA2, dict(final_logit_softcapping="30"), "'final_logit_softcapping' is '30', expected null, or"),
        (reference.GEMMA2, dict(layer_types=[LOCAL, LOCAL]), "expected every 3-th of 3 to be 'full_attention'"),
        (reference.GEMMA2, dict(layer_types=[GLOBAL, LOCAL, LOCAL]), "expected every 1-th of 3 to be 'full_attention'"),
        (
            reference.GEMMA2,
            dict(layer_types=[LOCAL, "chunked", LOCAL]),
            "'layer_types' is ['sliding_attention', 'chunk",
        ),
        (reference.GEMMA2, dict(use_bidirectional_attention=True), "'use_bidirectional_attention' is true, expected"),
        (reference.GEMMA3, dict(layer_types=[LOCAL, GLOBAL, LOCAL]), "expected every 3-th of 3 to be 'full_attention'"),
        (reference.GEMMA3, dict(sliding_window_pattern=0), "'sliding_window_pattern' is 0, expected an integer from 1"),
        (reference.GEMMA3, dict(rope_scaling=dict(rope_type="linear", factor=8.0)), "'rope_scaling.rope_type' is 'lin"),
        (reference.GEMMA3, dict(rope_local_base_freq=0), "'rope_local_base_freq' is 0, expected a number from 1"),
        (
            reference.GEMMA3,
            dict(rope_parameters={LOCAL: dict(rope_theta=99.0), GLOBAL: {}}),
            "'rope_theta' is 100 in one place and 99 in another",
        ),
        (
            reference.GEMMA3,
            dict(rope_parameters={LOCAL: dict(rope_type="linear", factor=2.0), GLOBAL: {}}),
            "'rope_parameters.sliding_attention.rope_type' is 'linear', expected 'default' or 'llama3'",
        ),
        (
            reference.GEMMA3,
            dict(rope_parameters={LOCAL: LLAMA["rope_scaling"], GLOBAL: {}}),
            "'rope_parameters.sliding_attention.rope_type' is 'llama3', expected 'default'",
        ),
        (
            reference.GEMMA3,
            dict(rope_parameters={GLOBAL: dict(rope_theta=5.0)}),
            "'rope_theta' is 100000 in one place and 5 in another",
        ),
        (reference.GPT2, dict(n_embd=50), "hidden_size is 50, expected a multiple of 6 heads"),
        (reference.GPT2, dict(n_embd=None), "'n_embd' is missing, expected an integer from 1"),
        (reference.GPT2, dict(n_inner=0), "'n_inner' is 0, expected an integer from 1"),
        (reference.GPT2, dict(activation_function="gelu"), "'activation_function' is 'gelu', expected 'gelu_new'"),
        (reference.GPT2, dict(scale_attn_weights=False), "'scale_attn_weights' is false, expected true"),
        (reference.GPT2, dict(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' is true"),
        (reference.GPT2, dict(add_cross_attention=True), "'add_cross_attention' is true, expected false"),
        (reference.QWEN3_MOE, dict(num_experts=None), "'num_experts' is missing, expected an integer from 1 to"),
        (reference.QWEN3_MOE, dict(num_experts_per_tok=9), "num_experts_per_tok is 9, expected at most num_experts"),
        (reference.QWEN3_MOE, dict(num_local_experts=4), "'num_local_experts' is 4 and 'num_experts' 8, expected one"),
        (reference.QWEN3_MOE, dict(norm_topk_prob=1), "'norm_topk_prob' is 1, expected true or false"),
        (reference.QWEN3_MOE, dict(decoder_sparse_step=2), "'decoder_sparse_step' is 2, expected 1"),
        (reference.QWEN3_MOE, dict(mlp_only_layers=[0]), "'mlp_only_layers' is [0], expected []"),
        (reference.QWEN3_MOE, dict(moe_intermediate_size=None), "'moe_intermediate_size' is missing, expected an inte"),
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


@pytest.mark.parametrize(
    ("base", "key"),
    [
        (reference.MISTRAL, "sliding_window"),
        (reference.GEMMA2, "attn_logit_softcapping"),
        (reference.GEMMA2, "final_logit_softcapping"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
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


def test_local_and_global_layers_are_spelt_in_an_older_and_a_newer_way():
    config = registry.FAMILIES["gemma3_text"].config
    older = reference.GEMMA3
    expected = config.from_hf(older)
    assert [expected.window(layer) for layer in range(3)] == [7, 7, None]
    written = expected.to_hf()  # in both ways, for older and newer readers
    assert written["layer_types"] == [LOCAL, LOCAL, GLOBAL] and written["sliding_window_pattern"] == 3
    names = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq")
    rope = {GLOBAL: dict(rope_type="default", rope_theta=100_000.0), LOCAL: dict(rope_theta=100.0)}
    newer = {key: value for key, value in older.items() if key not in names}
    newer |= dict(layer_types=[LOCAL, LOCAL, GLOBAL], rope_parameters=rope)
    assert config.from_hf(newer) == expected
    assert config.from_hf(older | newer) == expected
    short = config.from_hf({key: older[key] for key in older if key not in names} | dict(layer_types=[LOCAL] * 3))
    assert (short.global_every, short.rope_theta, short.local_theta) == (6, 1e6, 1e4)


def test_gemma2_layers_alternate_unless_the_file_says_else():
    config = registry.FAMILIES["gemma2"].config
    alternating = config.from_hf(reference.GEMMA2)
    assert [alternating.window(layer) for layer in range(4)] == [7, None, 7, None]
    assert config.from_hf(reference.GEMMA2 | dict(layer_types=[LOCAL, GLOBAL, LOCAL])) == alternating
    every = config.from_hf(reference.GEMMA2 | dict(layer_types=[GLOBAL] * 3))
    assert every.global_every == 1 and every.window(0) is None


def test_experts_have_an_older_and_a_newer_number():
    config = registry.FAMILIES["qwen3_moe"].config
    newer = {key: value for key, value in reference.QWEN3_MOE.items() if key != "num_experts"} | dict(
        num_local_experts=8
    )
    assert config.from_hf(newer) == config.from_hf(newer | dict(num_experts=8)) == config.from_hf(reference.QWEN3_MOE)


def test_a_missing_or_misshapen_expert_is_named(tmp_path):
    tensors = reference.random_tensors(reference.QWEN3_MOE)
    up, down = (f"model.layers.1.mlp.experts.6.{part}_proj.weight" for part in ("up", "down"))
    del tensors[up]
    tensors[down] = np.ascontiguousarray(tensors[down].T)
    with pytest.raises(CheckpointError) as caught:
        registry.load(None, checkpoint=write_checkpoint(tmp_path, reference.QWEN3_MOE, tensors))
    assert caught.value.missing == [up]
    assert caught.value.misshapen == [f"{down} (found [40, 48], expected [48, 40])"]


def test_a_name_stands_for_a_shape_that_includes_its_experts(tmp_path):
    config = qwen3_moe.Qwen3MoeConfig.tiny(num_experts=4)
    qwen3_moe.save_pretrained(random_model(qwen3_moe.Qwen3Moe, config), tmp_path)
    with pytest.raises(ConfigError, match="not qwen3-moe-tiny: its num_experts is 4, not 8"):
        registry.load("qwen3-moe-tiny", checkpoint=tmp_path)
