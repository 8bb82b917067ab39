"""Random damage to the text files and headers of a checkpoint: it loads, or one of the documented errors says why not."""

import json

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from models import registry
from models.common.errors import CheckpointError, ConfigError
from tests.models import hf_reference as reference
from tests.models.malformed import header_of, safetensors

HF = reference.LLAMA | dict(num_hidden_layers=1, eos_token_id=[3, 4], torch_dtype="float32")
HEADER, DATA = header_of(reference.random_tensors(HF))
FIRST, SECOND = (f"model-{shard:05}-of-00002.safetensors" for shard in (1, 2))
INDEX = {"metadata": {}, "weight_map": {name: (FIRST, SECOND)[i % 2] for i, name in enumerate(sorted(HEADER))}}

NUMBERS = st.one_of(
    st.integers(-2, 100),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["llama", "F16", "../x", FIRST])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def paths(value, prefix=()):
    """Every place inside of a JSON value."""
    yield prefix
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*prefix, key))


def replaced(value, path, new):
    """``value`` with ``new`` at ``path``; without it, if ``new`` is ``...``; renamed, if it is a function."""
    if not path:
        return value if new is ... or callable(new) else new
    (key, *rest), result = path, value.copy()
    if rest or not (new is ... or callable(new)):
        result[key] = replaced(value[key], rest, new)
    elif new is ...:
        del result[key]
    elif isinstance(result, dict):
        result[new()] = result.pop(key)
    return result


@st.composite
def damaged(draw, valid):
    """JSON text of ``valid`` with a few values replaced, removed or renamed, and perhaps a few bytes changed."""
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(list(paths(valid))))
        new = draw(st.one_of(VALUES, st.just(...), st.text(max_size=8).map(lambda name: lambda: name)))
        valid = replaced(valid, path, new)
    content = bytearray(json.dumps(valid).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


def loads(directory):
    """Whether it does; any other error than the two that are documented is what is looked for."""
    try:
        registry.load(None, checkpoint=directory)
    except (CheckpointError, ConfigError) as error:
        assert all(line.isprintable() for line in str(error).splitlines()) and len(str(error)) < 10_000
        return False
    return True


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The checkpoint in one file and in two; every test writes what it damages, and what it does not."""
    tensors, root = reference.random_tensors(HF), tmp_path_factory.mktemp("fuzz")
    result = [reference.write_checkpoint(root / str(shards), HF, tensors, shards) for shards in (1, 2)]
    assert all(map(loads, result))
    return result


@FEW
@given(damaged(HF))
def test_damaged_configurations(directories, content):
    (directories[0] / "model.safetensors").write_bytes(safetensors(HEADER, DATA))
    (directories[0] / "config.json").write_bytes(content)
    event(f"loads: {loads(directories[0])}")


@FEW
@given(damaged(INDEX))
def test_damaged_indices(directories, content):
    (directories[1] / "model.safetensors.index.json").write_bytes(content)
    event(f"loads: {loads(directories[1])}")


@FEW
@given(damaged(HEADER), st.one_of(st.none(), st.integers(0, 2**64 - 1)), st.integers(0, 8), st.binary(max_size=2))
def test_damaged_headers(directories, header, length, cut, more):
    (directories[0] / "config.json").write_text(json.dumps(HF))
    content = safetensors(header, DATA[: len(DATA) - cut] + more, length)
    (directories[0] / "model.safetensors").write_bytes(content)
    event(f"loads: {loads(directories[0])}")
