"""BERT against the NumPy reference, its checkpoints and command, and as one megakernel."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from models import bert
from models.bert import Bert, BertConfig
from models.bert.__main__ import main
from models.common.errors import CheckpointError, ConfigError, UsageError
from models.common.initialize import abstract_model, random_model
from tests.models import bert_reference as reference
from tests.models.gate import ROUGHLY, assert_numeric_gate
from tests.models.hf_reference import write_checkpoint

HF = reference.BERT
LENGTHS = [[17], [5], [1]]  # of the rows of a batch


@pytest.fixture(scope="module")
def tensors():
    return reference.random_tensors(HF)


@pytest.fixture(scope="module")
def directory(tensors, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bert"), HF, tensors)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    tokens, types = rng.integers(0, HF["vocab_size"], (3, 17)), rng.integers(0, 2, (3, 17))
    mask = np.arange(17) < np.array(LENGTHS)
    return tokens.astype(np.int32), mask.astype(np.int32), types.astype(np.int32)


def flat(model):
    return dict(nnx.to_flat_state(nnx.state(model)))


def assert_same(one, two):
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf[...], two[path][...], err_msg=str(path))


# Numbers


def test_hidden_states_and_pooler_match_the_reference(directory, tensors, inputs):
    model = bert.from_pretrained(directory)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, *args):
        model = nnx.merge(graphdef, state)
        hidden = model(*args)
        return hidden, model.pooled(hidden)

    hidden, pooled = run(state, *inputs)
    want, want_pooled = reference.encode(HF, tensors, *inputs)
    kept = inputs[1] != 0
    assert hidden.dtype == jnp.float32 and hidden.shape == (3, 17, 48)
    np.testing.assert_allclose(np.asarray(hidden)[kept], want[kept], atol=2e-5)
    np.testing.assert_allclose(pooled, want_pooled, atol=2e-5)


def test_without_mask_and_types_nothing_is_padding_and_all_types_are_zero(directory, tensors, inputs):
    tokens, ones, zeros = inputs[0], np.ones((3, 17), int), np.zeros((3, 17), int)
    hidden = jax.jit(bert.from_pretrained(directory))(tokens)
    np.testing.assert_allclose(hidden, reference.encode(HF, tensors, tokens, ones, zeros)[0], atol=2e-5)


def test_embeddings_match_the_reference_and_do_not_depend_on_padding(directory, tensors, inputs):
    tokens, mask, _ = inputs
    graphdef, state = nnx.split(bert.from_pretrained(directory))
    run = jax.jit(partial(bert.embed, graphdef))
    found = run(state, tokens, mask)
    hidden, _ = reference.encode(HF, tensors, tokens, mask, np.zeros_like(tokens))
    np.testing.assert_allclose(found, reference.embedding(hidden, mask), atol=1e-5)
    np.testing.assert_allclose(np.sum(np.asarray(found) ** 2, -1), 1, atol=1e-5)
    other = np.where(mask, tokens, 7)
    np.testing.assert_array_equal(run(state, other, mask), found)


# As one megakernel


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_one_megakernel_is_as_near_to_the_reference_as_jit(directory, tensors, inputs, dtype):
    tokens, mask, _ = inputs
    graphdef, state = nnx.split(bert.from_pretrained(directory, dtype=dtype))
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    exact = reference.embedding(reference.encode(HF, stored, tokens, mask, np.zeros_like(tokens))[0], mask)
    within = ROUGHLY if dtype == jnp.bfloat16 else 2e-5
    (found,) = assert_numeric_gate(partial(bert.embed, graphdef), exact, state, tokens, mask, within=within)
    assert found.dtype == np.float32


# Checkpoints


def test_what_is_saved_loads_again(tmp_path):
    model = random_model(Bert, BertConfig.tiny(num_types=3, norm_eps=1e-6), seed=5, dtype=jnp.bfloat16)
    bert.save_pretrained(model, tmp_path, max_file_bytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = bert.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_names_inside_of_a_model_with_a_head_and_old_names_of_norms(tmp_path, directory, tensors):
    older = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
    }
    assert "bert.encoder.layer.0.output.LayerNorm.gamma" in older
    older |= {"cls.predictions.bias": np.zeros(96, np.float32), "cls.seq_relationship.bias": np.zeros(2, np.float32)}
    older["bert.embeddings.position_ids"] = np.arange(40)
    write_checkpoint(tmp_path, HF | dict(architectures=["BertForPreTraining"]), older)
    assert_same(bert.from_pretrained(tmp_path), bert.from_pretrained(directory))


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path, tensors):
    gone, wide = "encoder.layer.0.output.LayerNorm.bias", "encoder.layer.1.intermediate.dense.weight"
    changed = {name: value for name, value in tensors.items() if name != gone}
    changed |= {wide: np.ascontiguousarray(tensors[wide].T), "strange": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError) as caught:
        bert.from_pretrained(write_checkpoint(tmp_path, HF, changed))
    assert caught.value.missing == [gone] and caught.value.unexpected == ["strange"]
    assert caught.value.misshapen == [f"{wide} (found [48, 80], expected [80, 48])"]


# Configurations


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(model_type="roberta"), "'model_type' is 'roberta', expected 'bert'"),
        (dict(hidden_act="gelu_new"), "'hidden_act' is 'gelu_new', expected 'gelu'"),
        (dict(position_embedding_type="relative_key"), "'position_embedding_type' is 'relative_key'"),
        (dict(is_decoder=True), "'is_decoder' is true"),
        (dict(add_cross_attention=True), "'add_cross_attention' is true"),
        (dict(quantization_config={}), "'quantization_config' is {}"),
        (dict(num_attention_heads=5), "48 features cannot be dealt out to 5 heads"),
        (dict(vocab_size=None), "'vocab_size' is missing, expected an integer"),
        (dict(num_hidden_layers=2.0), "'num_hidden_layers' is 2.0, expected an integer"),
        (dict(layer_norm_eps=0), "'layer_norm_eps' is 0, expected a number"),
    ],
)
def test_what_is_not_supported_is_refused(change, complaint):
    with pytest.raises(ConfigError) as caught:
        BertConfig.from_hf(HF | change, where="dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ") and complaint in str(caught.value)


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="num_layers is 0, expected an integer from 1 .*max_len is true"):
        BertConfig.tiny(num_layers=0, max_len=True)
    with pytest.raises(ConfigError, match="cannot be dealt out"):
        BertConfig.tiny().replace(num_heads=7)


@pytest.mark.parametrize("name", bert.PRESETS)
def test_presets_survive_config_json_and_have_their_published_size(name):
    config = bert.PRESETS[name]()
    assert BertConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(bert.PRESETS[name]())
    leaves = jax.tree.leaves(nnx.state(abstract_model(Bert, config, jnp.float32)))
    published = {"bert-base": 109_482_240, "minilm-l6": 22_713_216}
    if name in published:
        assert sum(leaf.size for leaf in leaves) == published[name]


# The command


WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "dog", "sleeps", "runs"]


@pytest.fixture
def with_tokenizer(tmp_path, tensors):
    write_checkpoint(tmp_path, HF, tensors)
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("implementation", ["jit", "cpu"])
def test_the_command_prints_the_cosine_of_each_pair(with_tokenizer, tensors, capsys, implementation):
    sentences = ["a cat sleeps", "a dog", "runs"]
    assert main([*sentences, "--checkpoint", str(with_tokenizer), "--implementation", implementation]) == 0
    rows = [[1, 4, 5, 7, 2], [1, 4, 6, 2, 0], [1, 8, 2, 0, 0]]
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    hidden, _ = reference.encode(HF, tensors, np.array(rows), mask, np.zeros((3, 5), int))
    cosines = reference.embedding(hidden, mask) @ reference.embedding(hidden, mask).T
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1:] for line in lines] == [
        [repr(sentences[i]), repr(sentences[j])] for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    found = [float(line.split()[0]) for line in lines]
    np.testing.assert_allclose(found, [cosines[0, 1], cosines[0, 2], cosines[1, 2]], atol=3e-6)


def test_the_command_names_what_is_wrong(with_tokenizer, capsys):
    assert main(["cat " * 50, "--checkpoint", str(with_tokenizer), "--implementation", "jit"]) == 2
    assert "has 52 tokens, expected at most 40" in capsys.readouterr().err
    assert main(["cat", "--checkpoint", str(with_tokenizer / "nowhere")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"a": 0}, "a"))
    with pytest.raises(UsageError, match="is empty"):
        bert.batch_of(tokenizer, ["a", ""], 10)
