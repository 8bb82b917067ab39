"""ViT against the NumPy reference, its checkpoints and command, and as one megakernel."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import vit
from models.common.errors import CheckpointError, ConfigError
from models.common.linen import describe
from models.vit import ViT, ViTConfig
from models.vit.__main__ import main
from tests.models import vit_reference as reference
from tests.models.gate import ROUGHLY, assert_numeric_gate
from tests.models.hf_reference import write_checkpoint

HF = reference.VIT


@pytest.fixture(scope="module")
def tensors():
    return reference.random_tensors(HF)


@pytest.fixture(scope="module")
def pixels():
    """In the reference's order of axes; many, since the errors of a few in bfloat16 are a matter of luck."""
    return np.random.default_rng(1).normal(size=(24, 3, 24, 24)).astype(np.float32)


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


# Numbers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_one_megakernel_is_as_near_to_the_reference_as_jit(tmp_path, tensors, pixels, dtype):
    model, params = vit.from_pretrained(write_checkpoint(tmp_path, HF, tensors), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    exact = reference.logits(HF, stored, pixels.astype(dtype).astype(np.float64))
    args = {"params": params}, pixels.transpose(0, 2, 3, 1)
    within = ROUGHLY if dtype == jnp.bfloat16 else 2e-5
    (found,) = assert_numeric_gate(model.apply, exact, *args, within=within)
    assert found.dtype == np.float32 and found.shape == (24, 10)


def test_patches_go_row_by_row_and_projections_may_lack_biases(tmp_path):
    hf = HF | dict(qkv_bias=False, num_channels=1, num_hidden_layers=1, image_size=8, patch_size=2)
    tensors = reference.random_tensors(hf)
    model, params = vit.from_pretrained(write_checkpoint(tmp_path, hf, tensors))
    assert "bias" not in params["layers_0"]["q"] and "bias" in params["layers_0"]["o"]
    pixels = np.random.default_rng(2).normal(size=(1, 1, 8, 8)).astype(np.float32)
    found = jax.jit(model.apply)({"params": params}, pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, reference.logits(hf, tensors, pixels), atol=2e-5)


# Checkpoints


def test_what_is_saved_loads_again(tmp_path):
    model, params = vit.random_model(ViTConfig.tiny(qkv_bias=False, norm_eps=1e-6), dtype=jnp.bfloat16, seed=5)
    vit.save_pretrained(model, params, tmp_path, max_file_bytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, loaded = vit.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert again.config == model.config
    assert_same(params, loaded)


def test_saved_tensors_have_the_layouts_of_hugging_face(tmp_path, tensors):
    model, params = vit.from_pretrained(write_checkpoint(tmp_path / "from", HF, tensors))
    vit.save_pretrained(model, params, tmp_path / "to")
    saved = load_file(tmp_path / "to" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path, tensors):
    gone, flipped = "vit.encoder.layer.1.output.dense.bias", "vit.embeddings.patch_embeddings.projection.weight"
    changed = {name: value for name, value in tensors.items() if name != gone}
    changed |= {flipped: np.ascontiguousarray(tensors[flipped].T), "strange": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError) as caught:
        vit.from_pretrained(write_checkpoint(tmp_path, HF, changed))
    assert caught.value.missing == [gone] and caught.value.unexpected == ["strange"]
    assert caught.value.misshapen == [f"{flipped} (found [8, 8, 3, 48], expected [48, 3, 8, 8])"]


def test_random_parameters_are_seeded_and_scaled():
    _, params = vit.random_model(ViTConfig.tiny(), seed=3)
    assert_same(params, vit.random_model(ViTConfig.tiny(), seed=3)[1])
    other = vit.random_model(ViTConfig.tiny(), seed=4)[1]
    assert np.any(params["patches"]["kernel"] != other["patches"]["kernel"])
    assert abs(np.std(params["patches"]["kernel"]) * np.sqrt(3 * 8 * 8) - 1) < 0.05
    assert np.all(params["norm"]["scale"] == 1)


# Configurations


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(model_type="deit"), "'model_type' is 'deit', expected 'vit'"),
        (dict(hidden_act="relu"), "'hidden_act' is 'relu', expected 'gelu'"),
        (dict(quantization_config={}), "'quantization_config' is {}"),
        (dict(num_attention_heads=5), "48 features cannot be dealt out to 5 heads"),
        (dict(patch_size=7), "image_size is 24, expected a multiple of patch_size, which is 7"),
        (dict(image_size=[24, 24]), "'image_size' is [24, 24], expected an integer"),
        (dict(hidden_size=None), "'hidden_size' is missing, expected an integer"),
        (dict(id2label=["a"]), "'id2label' is ['a'], expected an object or null"),
        (dict(id2label={}), "'num_labels' is 0, expected an integer from 1"),
    ],
)
def test_what_is_not_supported_is_refused(change, complaint):
    with pytest.raises(ConfigError) as caught:
        ViTConfig.from_hf(HF | change, where="dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ") and complaint in str(caught.value)


def test_without_names_of_labels_there_are_two():
    assert ViTConfig.from_hf({key: value for key, value in HF.items() if key != "id2label"}).num_labels == 2


@pytest.mark.parametrize("name", vit.PRESETS)
def test_presets_survive_config_json_and_have_their_published_size(name):
    config = vit.PRESETS[name]()
    assert ViTConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(vit.PRESETS[name]())
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    count = sum(leaf.size for leaf in describe(ViT(config), pixels).values())
    if name == "vit-base-patch16-224":
        assert count == 86_567_656


# The command


def test_the_command_prints_the_likeliest_labels(tmp_path, tensors, capsys):
    directory = write_checkpoint(tmp_path, HF, tensors)
    assert main(["--checkpoint", str(directory), "--implementation", "cpu"]) == 0
    noise = np.random.default_rng(0).normal(size=(1, 24, 24, 3)).astype(np.float32)
    (exact,) = reference.logits(HF, tensors, noise.transpose(0, 3, 1, 2))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[-1]) for line in lines] == list(np.argsort(-exact)[:5])
    exact = np.exp(exact) / np.exp(exact).sum()
    np.testing.assert_allclose([float(line.split()[0]) for line in lines], np.sort(exact)[::-1][:5], atol=6e-5)
    assert main(["--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert "there is no directory" in capsys.readouterr().err
