"""Whatever a config.json may hold: one error that names the file, the field, and what would be right."""

import json
import os

import pytest

from models import registry
from models.common import limits
from models.common.config import DecoderConfig
from models.common.errors import CheckpointError, ConfigError, ModelError
from models.common.rotary import Llama3RopeScaling
from models.llama import LlamaConfig
from models.qwen3 import Qwen3Config
from tests.models import hf_reference as reference
from tests.models.malformed import unblocked

QWEN3, LLAMA = reference.QWEN3, reference.LLAMA
SCALING = LLAMA["rope_scaling"]
HUGE = 10**400

INTEGERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
REQUIRED = set(INTEGERS) - {"num_key_value_heads", "head_dim"}
NO_INTEGERS = ["12", "", True, False, 4.7, 48.0, 1e999, -1, 0, 10**9, HUGE, [48], {}, {"a": 1}]
NO_REALS = ["1e4", True, -1, -1e-6, 0, 0.0, 1e999, -1e999, float("nan"), HUGE, [1e4], {}]
NO_FLAGS = ["true", "", 0, 1, 0.0, [], {}]


def complaint(change, base=QWEN3, config=Qwen3Config):
    with pytest.raises(ConfigError) as caught:
        config.from_hf(base | change, where="dir/config.json")
    message = str(caught.value)
    assert message.startswith("dir/config.json: ") and len(message) < 2000 and "\n" not in message
    return message


@pytest.mark.parametrize("value", NO_INTEGERS, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("key", INTEGERS)
def test_sizes_are_integers_within_their_bounds(key, value):
    message = complaint({key: value})
    assert f"'{key}' is " in message and ", expected an integer from " in message


@pytest.mark.parametrize("key", sorted(REQUIRED))
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_required_fields(key, absent):
    hf = {name: value for name, value in QWEN3.items() if name != key} if absent else QWEN3 | {key: None}
    with pytest.raises(ConfigError, match=f"'{key}' is missing, expected an integer from 1 to "):
        Qwen3Config.from_hf(hf)


@pytest.mark.parametrize("value", NO_REALS, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_numbers_are_finite_and_within_their_bounds(key, value):
    message = complaint({key: value})
    assert f"'{key}' is " in message and ", expected a number from " in message


@pytest.mark.parametrize("value", NO_FLAGS, ids=repr)
@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"])
def test_flags_are_booleans(key, value):
    message = complaint({key: value})
    assert f"'{key}' is " in message and ("expected true or false" in message or "expected false" in message)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (dict(vocab_size=10**9), f"'vocab_size' is 1000000000, expected an integer from 1 to {limits.VOCABULARY}"),
        (dict(num_hidden_layers=10**9), f"expected an integer from 1 to {limits.LAYERS}"),
        (dict(num_hidden_layers=4.7), "'num_hidden_layers' is 4.7, expected an integer"),
        (dict(head_dim=15), "'head_dim' is 15, expected an integer from 2 to 1024 that is a multiple of 2"),
        (dict(num_key_value_heads=4), "6 query heads cannot share 4 key/value heads evenly"),
        (dict(num_attention_heads=1), "1 query heads cannot share 2"),
        (
            dict(head_dim=None, num_attention_heads=10, num_key_value_heads=5),
            "'head_dim' is missing, and 'hidden_size' 48",
        ),
        (dict(head_dim=None, num_attention_heads=16), "head_dim is 3, expected an integer from 2 to 1024"),
        (
            dict(hidden_size=1 << 17, intermediate_size=1 << 20, num_hidden_layers=512),
            "parameters, expected at most 4,398,046,511,104",
        ),
        (dict(rms_norm_eps=2), "'rms_norm_eps' is 2, expected a number from 1e-12 to 1"),
        (dict(rope_theta=float("inf")), "'rope_theta' is inf, expected a number from 1 to 1e+12"),
        (dict(eos_token_id=-1), "'eos_token_id' is -1, expected an integer from 0"),
        (dict(eos_token_id="2"), "'eos_token_id' is '2', expected"),
        (dict(eos_token_id=True), "'eos_token_id' is true, expected"),
        (dict(eos_token_id=[1, 2.0]), "'eos_token_id' is [1, 2.0], expected"),
        (dict(eos_token_id=[[1]]), "'eos_token_id' is [[1]], expected"),
        (dict(eos_token_id={"a": 1}), "'eos_token_id' is {'a': 1}, expected"),
        (dict(eos_token_id=[1, 96]), "eos_token_id is 96, expected less than vocab_size, which is 96"),
        (dict(model_type="llama"), "'model_type' is 'llama', expected 'qwen3'"),
        (dict(model_type=["qwen3"]), "'model_type' is ['qwen3'], expected 'qwen3'"),
        (dict(hidden_act="gelu"), "'hidden_act' is 'gelu', expected 'silu'"),
        (dict(hidden_act=1), "'hidden_act' is 1, expected 'silu'"),
        (dict(torch_dtype="float8_e4m3fn"), "'torch_dtype' is 'float8_e4m3fn', expected 'bfloat16' or"),
        (dict(torch_dtype=16), "'torch_dtype' is 16, expected 'bfloat16' or"),
        (dict(dtype="int4"), "'dtype' is 'int4', expected 'bfloat16' or"),
        (dict(quantization_config={}), "'quantization_config' is {}, expected null"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "'layer_types' is "),
        (dict(layer_types="full_attention"), "'layer_types' is 'full_attention', expected a list"),
        (dict(partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5, expected 1"),
        (dict(hidden_size="x" * 10**6), "'hidden_size' is 'xxx"),
        (dict(hidden_act="\x1b[2J\n\ud800"), r"'hidden_act' is '\x1b[2J\n\ud800'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_what_is_wrong_is_named(change, fragment):
    message = complaint(change)
    assert fragment in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (dict(rope_scaling=[]), "'rope_scaling' is [], expected an object or null"),
        (dict(rope_scaling="linear"), "'rope_scaling' is 'linear', expected an object or null"),
        (dict(rope_parameters=4.0), "'rope_parameters' is 4.0, expected an object or null"),
        (
            dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
            "'rope_scaling.rope_type' is 'yarn', expected 'default' or",
        ),
        (dict(rope_scaling=dict(type="linear", factor=4.0)), "'rope_scaling.type' is 'linear', expected 'default' or"),
        (dict(rope_scaling=dict(rope_type=["llama3"])), "'rope_scaling.rope_type' is ['llama3'], expected"),
        (dict(rope_scaling=dict(factor=4.0)), "'rope_scaling.rope_type' is missing, expected 'default' or 'llama3'"),
        (
            dict(rope_scaling=dict(rope_type="default", factor=4.0)),
            "'rope_scaling.factor' is not supported with rope_type",
        ),
        (dict(rope_scaling=SCALING | dict(mscale=2)), "'rope_scaling.mscale' is not supported with rope_type 'llama3'"),
        (dict(rope_scaling=SCALING | dict(type="default")), "'rope_scaling.rope_type' and 'rope_scaling.type' differ"),
        (dict(rope_scaling=SCALING | dict(factor=None)), "'rope_scaling.factor' is missing, expected a number from 1"),
        (dict(rope_scaling=SCALING | dict(factor="8")), "'rope_scaling.factor' is '8', expected a number"),
        (dict(rope_scaling=SCALING | dict(factor=0)), "'rope_scaling.factor' is 0, expected a number from 1"),
        (dict(rope_scaling=SCALING | dict(factor=float("nan"))), "'rope_scaling.factor' is nan, expected a number"),
        (dict(rope_scaling=SCALING | dict(low_freq_factor=-1)), "'rope_scaling.low_freq_factor' is -1, expected"),
        (
            dict(rope_scaling=SCALING | dict(low_freq_factor=4.0)),
            "low_freq_factor is 4, expected less than high_freq_factor",
        ),
        (
            dict(rope_scaling=SCALING | dict(original_max_position_embeddings=64.0)),
            "'rope_scaling.original_max_position_embeddings' is 64.0, expected an integer from 1",
        ),
        (dict(rope_parameters=dict(rope_theta=5e5)), "'rope_theta' is 10000 in one place and 500000 in another"),
        (dict(rope_parameters=SCALING | dict(factor=9.0)), "'rope_parameters' and 'rope_scaling' differ"),
        (dict(rope_parameters=dict(rope_theta=0)), "'rope_parameters.rope_theta' is 0, expected a number from 1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:50],
)
def test_every_malformed_rope_scaling_is_refused(change, fragment):
    assert fragment in complaint(change, LLAMA, LlamaConfig)


def test_both_spellings_of_a_rope_scaling_may_agree_and_older_names_count():
    expected = LlamaConfig.from_hf(LLAMA)
    newer = SCALING | dict(rope_theta=10000)
    older = {"type": "llama3"} | {key: value for key, value in SCALING.items() if key != "rope_type"}
    for change in (dict(rope_parameters=newer), dict(rope_scaling=older), dict(rope_scaling=SCALING | older)):
        assert LlamaConfig.from_hf(LLAMA | change) == expected
    plain = dict(rope_scaling=None)
    for nothing in ({}, dict(rope_type="default"), dict(rope_type="default", factor=None), dict(rope_theta=10000.0)):
        assert LlamaConfig.from_hf(LLAMA | plain | dict(rope_parameters=nothing)).rope_scaling is None


def test_all_that_is_wrong_is_said_at_once():
    message = complaint(dict(vocab_size=None, head_dim=3, hidden_act="relu", rope_scaling=7, eos_token_id=1.5))
    for key in ("vocab_size", "head_dim", "hidden_act", "rope_scaling", "eos_token_id"):
        assert f"'{key}' is " in message


def test_null_is_the_same_as_absent_and_an_integer_is_a_number():
    optional = ["model_type", "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act"]
    without = {key: value for key, value in QWEN3.items() if key not in optional}
    config = Qwen3Config.from_hf(without)
    assert config == Qwen3Config.from_hf(without | dict.fromkeys(optional))
    assert config.num_kv_heads == config.num_heads and config.rope_theta == 1e6 and not config.tie_embeddings
    assert Qwen3Config.from_hf(without | dict(head_dim=None)).head_dim == 8
    theta = Qwen3Config.from_hf(QWEN3 | dict(rope_theta=10000)).rope_theta
    assert theta == 10000.0 and isinstance(theta, float)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (dict(num_layers=0), "num_layers is 0, expected an integer from 1"),
        (dict(num_layers=True), "num_layers is true, expected"),
        (dict(norm_eps=0.0), "norm_eps is 0.0, expected a number"),
        (dict(rope_theta=float("nan")), "rope_theta is nan, expected"),
        (dict(tie_embeddings=1), "tie_embeddings is 1, expected true or false"),
        (dict(rope_scaling={"factor": 2}), "rope_scaling is {'factor': 2}, expected a Llama3RopeScaling"),
        (dict(eos_token_ids=(256,)), "eos_token_id is 256, expected less than vocab_size"),
        (dict(max_len=-1, num_heads=None), "num_heads is null, expected an integer from 1 to 1024; max_len is -1"),
    ],
)
def test_a_configuration_made_in_python_is_checked_too(change, fragment):
    with pytest.raises(ConfigError) as caught:
        Qwen3Config.tiny().replace(**change)
    assert fragment in str(caught.value)


def test_a_configuration_is_of_proper_types_whatever_it_was_made_of():
    np = pytest.importorskip("numpy")
    config = Qwen3Config.tiny(num_layers=np.int64(2), rope_theta=10000, eos_token_ids=[3, 4])
    assert config == Qwen3Config.tiny(eos_token_ids=(3, 4)) and hash(config) == hash(config.replace())
    assert type(config.num_layers) is int and type(config.rope_theta) is float
    with pytest.raises(ConfigError, match="rope scaling: factor is 0.5, expected a number from 1"):
        Llama3RopeScaling(factor=0.5, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=64)
    assert issubclass(ConfigError, ModelError) and issubclass(CheckpointError, ModelError)
    assert DecoderConfig.__dataclass_params__.frozen


def test_config_errors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | dict(num_hidden_layers=limits.LAYERS + 1)))
    with pytest.raises(ConfigError) as caught:
        registry.load(None, checkpoint=tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "'num_hidden_layers'" in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({key: QWEN3[key] for key in QWEN3 if key != "model_type"}))
    with pytest.raises(ConfigError, match="config.json: 'model_type' is missing, expected 'gemma2' or '"):
        registry.load(None, checkpoint=tmp_path)


# The file


def as_text(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


VALID = json.dumps(QWEN3)
FILES = {
    "absent": (lambda path: None, "there is no such file"),
    "a directory": (lambda path: path.mkdir(), "expected a regular file, found a directory"),
    "a FIFO": (os.mkfifo, "expected a regular file, found a FIFO"),
    "a link to a FIFO": (
        lambda path: (os.mkfifo(path.with_name("fifo")), path.symlink_to("fifo")),
        "expected a regular file, found a FIFO",
    ),
    "a link to a device": (lambda path: path.symlink_to("/dev/null"), "expected a regular file, found a device"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "there is no such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "empty": (as_text(""), "not JSON: Expecting value"),
    "not JSON": (as_text("{"), "not JSON: "),
    "more than JSON": (as_text(VALID + "}"), "not JSON: Extra data"),
    "a list": (as_text("[1]"), "expected a JSON object, found [1]"),
    "null": (as_text("null"), "expected a JSON object, found null"),
    "a string": (as_text('"config"'), "expected a JSON object, found 'config'"),
    "Latin-1": (as_text(VALID[:-1].encode() + b', "a": "\xe4"}'), "not UTF-8 text: byte"),
    "UTF-16": (as_text(VALID.encode("utf-16")), "not UTF-8 text: byte 0 is 0xff"),
    "with a mark of byte order": (as_text(b"\xef\xbb\xbf" + VALID.encode()), "not JSON: Unexpected UTF-8 BOM"),
    "NaN": (as_text(VALID[:-1] + ', "unread": NaN}'), "NaN is no number of JSON"),
    "Infinity": (as_text(VALID[:-1] + ', "unread": [-Infinity]}'), "-Infinity is no number of JSON"),
    "a name twice": (as_text(VALID[:-1] + ', "vocab_size": 96}'), "the name 'vocab_size' is there twice"),
    "a name twice inside": (as_text(VALID[:-1] + ', "unread": {"a": 1, "a": 1}}'), "the name 'a' is there twice"),
    "nested deeply": (as_text('{"a": ' + "[" * 10**6 + "]" * 10**6 + "}"), "nested too deeply"),
    "a number of 5,000 digits": (as_text(VALID[:-1] + ', "unread": ' + "9" * 5000 + "}"), "not JSON: "),
    "too large": (
        lambda path: (path.touch(), os.truncate(path, limits.JSON_BYTES + 1)),
        "it has 67,108,865 bytes, expected at most 67,108,864",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration(tmp_path, case):
    make, fragment = FILES[case]
    path = tmp_path / "config.json"
    make(path)
    with unblocked(tmp_path), pytest.raises(CheckpointError) as caught:
        registry.load(None, checkpoint=tmp_path)
    assert fragment in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(caught.value.corrupt) == 1 and caught.value.corrupt[0].startswith("config.json (")


@pytest.mark.parametrize("directory", ["nowhere", "file", "file/inside", "x" * 5000, "null\0", "\udcff"])
def test_a_directory_that_is_none(tmp_path, directory):
    (tmp_path / "file").write_text("text")
    for name in (None, "qwen3-tiny"):
        with pytest.raises(CheckpointError, match="config.json"):
            registry.load(name, checkpoint=f"{tmp_path}/{directory}")
