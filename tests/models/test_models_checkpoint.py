"""Whatever may be wrong with the files of weights, their index and the tokenizer: one error, and nothing followed."""

import json
import os
import shutil
import socket

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

from models import qwen3, registry
from models.common import limits, memory
from models.common.checkpoint import load_model
from models.common.errors import CheckpointError, ConfigError, TokenizerError
from models.common.tokenizer import encode, load_tokenizer
from tests.models import hf_reference as reference
from tests.models.malformed import header_of, safetensors, unblocked

HF = reference.QWEN3 | dict(num_hidden_layers=1)
TENSORS = reference.random_tensors(HF)
HEADER, DATA = header_of(TENSORS)
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def failure(directory):
    with unblocked(directory), pytest.raises(CheckpointError) as caught:
        registry.load(None, checkpoint=directory)
    assert str(caught.value).startswith(f"cannot load the checkpoint {directory}\n")
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    return caught.value


# The files of weights


def changed(name, **fields):
    """A file in whose header some fields of a tensor are different."""
    return safetensors(HEADER | {name: HEADER[name] | fields}, DATA)


FILES = {
    "absent": (None, "there is no such file"),
    "empty": (b"", "it ends after 0 of 8 bytes"),
    "a few bytes": (b"\1\0\0", "it ends after 3 of 8 bytes"),
    "a length alone": (b"\xff" * 8, "its header would have 18,446,744,073,709,551,615 bytes, and the file has 8"),
    "a header beyond the end": (safetensors(HEADER, DATA, 1 << 20), "its header would have 1,048,576 bytes"),
    "a huge header": (safetensors(HEADER, DATA, 1 << 62), "its header would have 4,611,686,018,427,387,904 bytes"),
    "a header cut off": (safetensors(HEADER, DATA, 100), "not JSON"),
    "a header of no bytes": (safetensors(b"", DATA), "not JSON"),
    "a list": (safetensors([HEADER], DATA), "expected a JSON object"),
    "Latin-1": (safetensors(b'{"\xe4": 1}', DATA), "not UTF-8 text: byte 2 is 0xe4"),
    "nested deeply": (safetensors(b'{"a":' + b"[" * 10**6, b""), "nested too deeply"),
    "NaN": (safetensors(b'{"a": NaN}', b""), "NaN is no number of JSON"),
    "a name twice": (
        safetensors(json.dumps(HEADER)[:-1].encode() + f', "{NORM}": {json.dumps(HEADER[NORM])}}}'.encode(), DATA),
        f"the name '{NORM}' is there twice",
    ),
    "truncated": (safetensors(HEADER, DATA)[:-4], ""),
    "longer than its tensors": (safetensors(HEADER, DATA + b"rest"), ""),
    "overlapping offsets": (changed(NORM, data_offsets=[0, 192]), ""),
    "offsets backwards": (changed(NORM, data_offsets=HEADER[NORM]["data_offsets"][::-1]), ""),
    "negative offsets": (changed(NORM, data_offsets=[-192, 0]), ""),
    "offsets of another shape": (changed(NORM, shape=[47]), ""),
    "an unknown type": (changed(NORM, dtype="F128"), ""),
    "a type that is no text": (changed(NORM, dtype=32), ""),
    "a shape of floats": (changed(NORM, shape=[48.0]), ""),
    "a negative shape": (changed(NORM, shape=[-48]), ""),
    "a shape beyond 64 bits": (changed(NORM, shape=[1 << 40, 1 << 40]), ""),
    "a tensor without offsets": (safetensors(HEADER | {NORM: {"dtype": "F32", "shape": [48]}}, DATA), ""),
    "metadata of numbers": (safetensors({"__metadata__": {"format": 1}} | HEADER, DATA), ""),
    "not safetensors": (b"PK\3\4" + bytes(range(256)), "its header would have"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", [SINGLE, SECOND], ids=["single", "shard"])
def test_a_file_that_is_no_safetensors(tmp_path, name, case):
    content, fragment = FILES[case]
    reference.write_checkpoint(tmp_path, HF, TENSORS, shards=1 if name == SINGLE else 2)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = failure(tmp_path)
    assert len(error.corrupt) == 1 and error.corrupt[0].startswith(f"{name} (") and fragment in error.corrupt[0]


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the name of a socket is short


NOT_REGULAR = {
    "directory": lambda path: path.mkdir(),
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "socket": listen,
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("name", [SINGLE, SECOND, INDEX, "tokenizer.json"])
def test_nothing_but_regular_files_is_opened(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    reference.write_checkpoint(tmp_path, HF, TENSORS, shards=1 if name == SINGLE else 2)
    (tmp_path / name).unlink(missing_ok=True)
    NOT_REGULAR[kind](tmp_path / name)
    if name == "tokenizer.json":
        with unblocked(tmp_path), pytest.raises(TokenizerError) as caught:
            load_tokenizer(tmp_path)
        message = str(caught.value)
    else:
        (message,) = failure(tmp_path).corrupt
    assert name in message and "expected a regular file, found a " in message and kind in message


def test_links_to_regular_files_are_followed(tmp_path):
    """As the cache of the Hugging Face hub has them: a directory of links to files elsewhere."""
    blobs = reference.write_checkpoint(tmp_path / "blobs", HF, TENSORS, shards=2)
    links = tmp_path / "snapshot"
    links.mkdir()
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (links / path.name).symlink_to(f"../blobs/{number}")
    model, _ = registry.load(None, checkpoint=links, dtype=np.float32)
    np.testing.assert_array_equal(model.embed.embedding[...], TENSORS[EMBEDDING])


def test_a_deep_model_without_its_tensors_is_refused_before_it_is_described(tmp_path, monkeypatch):
    reference.write_checkpoint(tmp_path, HF | dict(num_hidden_layers=limits.LAYERS), TENSORS)
    described = []

    def abstract(model_class, config, dtype):
        described.append(config.num_layers)
        return original(model_class, config, dtype)

    original = load_model.__globals__["abstract_model"]
    monkeypatch.setitem(load_model.__globals__, "abstract_model", abstract)
    error = failure(tmp_path)
    assert described == [1] and len(error.missing) == 11 * (limits.LAYERS - 1)
    assert "and 5613 more" in str(error)


def test_a_model_larger_than_memory_is_refused_before_any_of_it_is_read(tmp_path, monkeypatch):
    reference.write_checkpoint(tmp_path, HF, TENSORS)
    size = sum(value.size for value in TENSORS.values()) * 4
    progress = []
    monkeypatch.setattr(memory, "device_memory", lambda: size - 1)
    with pytest.raises(ConfigError, match="as float32, takes 0.0 GB, but the device has 0.0"):
        registry.load(None, checkpoint=tmp_path, dtype=np.float32, progress=lambda *args: progress.append(args))
    assert not progress
    monkeypatch.setattr(memory, "device_memory", lambda: size)
    registry.load(None, checkpoint=tmp_path, dtype=np.float32)


# The index


def sharded(tmp_path, change):
    """A checkpoint of two files in a directory of its own, with ``change(index)`` as its index, and files beside it."""
    directory = reference.write_checkpoint(tmp_path / "model", HF, TENSORS, shards=2)
    shutil.copy(directory / FIRST, tmp_path / "outside.safetensors")
    path = directory / INDEX
    index = change(json.loads(path.read_text()))
    path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return directory


def mapping(**changes):
    """An index whose map of files has other values; None removes one."""
    changes = {{"norm": NORM, "embedding": EMBEDDING}.get(name, name): value for name, value in changes.items()}

    def change(index):
        files = index["weight_map"] | changes
        return index | {"weight_map": {name: file for name, file in files.items() if name not in changes or file}}

    return change


def moved(to):
    """An index that names ``to`` in the place of the first file."""
    return lambda index: {
        "weight_map": {name: to if file == FIRST else file for name, file in index["weight_map"].items()}
    }


PLAIN = "expected the plain name of a .safetensors file beside the index"
INDICES = {
    "empty": (lambda index: b"", "not JSON"),
    "no object": (lambda index: [index], "expected a JSON object"),
    "no map": (lambda index: {"metadata": {}}, "'weight_map' is missing, expected an object"),
    "a map that is none": (lambda index: {"weight_map": [FIRST]}, f"'weight_map' is ['{FIRST}'], expected an object"),
    "a map of nothing": (lambda index: {"weight_map": {}}, "'weight_map' is {}, expected an object"),
    "a name twice": (
        lambda index: f'{{"weight_map": {{"a": "{FIRST}", "a": "{FIRST}"}}}}'.encode(),
        "'a' is there twice",
    ),
    "a number": (mapping(norm=1), f"{NORM} is in 1, {PLAIN}"),
    "a list": (mapping(norm=[FIRST]), f"{NORM} is in ['{FIRST}'], {PLAIN}"),
    "an object": (mapping(norm={"file": FIRST}), PLAIN),
    "null": (lambda index: {"weight_map": index["weight_map"] | {NORM: None}}, f"{NORM} is in null, {PLAIN}"),
    "outside": (moved("../outside.safetensors"), f"is in '../outside.safetensors', {PLAIN}"),
    "outside by an absolute path": (moved("/tmp/outside.safetensors"), PLAIN),
    "outside, on Windows": (moved("..\\outside.safetensors"), PLAIN),
    "inside after all": (moved(f"../model/{FIRST}"), PLAIN),
    "the directory itself": (moved("."), PLAIN),
    "no name": (mapping(norm=" "), PLAIN),
    "another format": (moved("pytorch_model.bin"), PLAIN),
    "a name with a null": (moved("a\0.safetensors"), PLAIN),
    "a name with half a character": (moved("\ud800.safetensors"), "no file can have this name"),
    "a name that is too long": (moved("x" * 300 + ".safetensors"), "File name too long"),
    "an absent file": (moved("other.safetensors"), "other.safetensors (there is no such file)"),
    "a tensor in the other file": (mapping(norm=SECOND), f"{NORM} is said to be in {SECOND}, and is in {FIRST}"),
    "a tensor of no file": (mapping(other=FIRST), f"other is said to be in {FIRST}, and is in no file"),
    "a tensor left out": (mapping(norm=None), f"{NORM} is said to be in no file, and is in {FIRST}"),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_malformed_index(tmp_path, case):
    change, fragment = INDICES[case]
    error = failure(sharded(tmp_path, change))
    assert fragment in str(error) and error.corrupt


def test_an_absolute_path_in_an_index_is_not_followed_even_where_the_file_is_right(tmp_path):
    outside = tmp_path / "outside.safetensors"
    error = failure(sharded(tmp_path, moved(str(outside))))
    assert outside.exists() and PLAIN in str(error)


def test_a_tensor_in_two_files(tmp_path):
    directory = sharded(tmp_path, lambda index: index)
    names = json.loads((directory / INDEX).read_text())["weight_map"]
    both = {name: TENSORS[name] for name in TENSORS if names[name] == SECOND or name == NORM}
    (directory / SECOND).write_bytes(safetensors(*header_of(both)))
    error = failure(directory)
    assert len(error.corrupt) == 1 and error.corrupt[0].endswith(f"is in {FIRST} too)")


def test_a_single_file_that_the_index_does_not_know_is_not_passed_over(tmp_path):
    directory = sharded(tmp_path, lambda index: index)
    (directory / SINGLE).write_bytes(safetensors(HEADER, DATA))
    assert failure(directory).corrupt == [f"{SINGLE} (it is not one of the files of {INDEX}, expected one of the two)"]
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, SINGLE)}))
    (directory / "consolidated.safetensors").write_bytes(b"of another program")
    registry.load(None, checkpoint=directory)


def test_an_index_that_leads_nowhere_is_not_as_good_as_none(tmp_path):
    reference.write_checkpoint(tmp_path, HF, TENSORS)
    (tmp_path / INDEX).symlink_to("nowhere")
    assert failure(tmp_path).corrupt == [f"{INDEX} (there is no such file)"]


@pytest.mark.parametrize("limits", [(1 << 30, 30_000), (30_000, 1 << 30)], ids=["sharded last", "single last"])
def test_what_is_saved_last_is_what_loads(tmp_path, limits):
    for seed, limit in enumerate(limits):
        model, config = registry.load("qwen3-tiny", seed=seed)
        qwen3.save_pretrained(model, tmp_path, max_file_bytes=limit)
    loaded, _ = registry.load(None, checkpoint=tmp_path)
    np.testing.assert_array_equal(loaded.embed.embedding[...], model.embed.embedding[...])


# Names and shapes that do not fit


def test_names_from_a_file_do_not_spoil_the_message(tmp_path):
    strange = {"\x1b[2J": np.ones(1), "two\nlines": np.ones(1), "x" * 10_000: np.ones(1)}
    reference.write_checkpoint(tmp_path, HF, TENSORS)
    (tmp_path / SINGLE).write_bytes(safetensors(*header_of(TENSORS | strange)))
    error = failure(tmp_path)
    assert set(error.unexpected) == set(strange) and len(str(error)) < 2000
    assert r"'\x1b[2J'" in str(error) and r"'two\nlines'" in str(error)


@pytest.mark.parametrize("shape", [[], [1, 48], [47], [0]])
def test_other_shapes(tmp_path, shape):
    reference.write_checkpoint(tmp_path, HF, TENSORS | {NORM: np.ones(shape, np.float32)})
    assert failure(tmp_path).misshapen == [f"{NORM} (found {shape}, expected [48])"]


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1.5, True, "0"])
def test_seeds_out_of_range(seed):
    with pytest.raises(ConfigError, match="expected an integer from 0 to 4294967295"):
        registry.load("qwen3-tiny", seed=seed)


# The tokenizer

# The library cuts a prefix off a token that is shorter: its Rust panics, which is no Exception in Python.
PANICS = b"""{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]],
"continuing_subword_prefix": "longer than a token"}}"""


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not a tokenizer: "),
        (b"[]", "not a tokenizer: "),
        (b"\xff", "not a tokenizer: "),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "not a tokenizer: "),
        (b'{"a":' + b"[" * 10**5, "not a tokenizer: "),
        (PANICS, "not a tokenizer: "),
        (None, "it has 268,435,457 bytes, expected at most 268,435,456"),
    ],
    ids=["empty", "list", "not UTF-8", "no vocabulary", "nested deeply", "panics", "too large"],
)
def test_a_malformed_tokenizer(tmp_path, content, fragment):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content or b"")
    if content is None:
        os.truncate(path, limits.TOKENIZER_BYTES + 1)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert f"cannot read {path}: {fragment}" in str(caught.value)


def test_a_tokenizer_does_not_cut_or_fill_a_prompt_and_says_what_it_does_not_know(tmp_path):
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"one": 0, "two": 1}, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, "one two one two one") == [0, 1, 0, 1, 0] and encode(loaded, "two") == [1]
    with pytest.raises(TokenizerError, match="cannot encode the text"):
        encode(loaded, "three")
