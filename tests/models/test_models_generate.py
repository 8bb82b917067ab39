"""The generate command from end to end, with the trained demo and with random weights."""

import re
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from models import generate as command
from models import generation, registry
from models.common import limits
from models.common.errors import UsageError
from models.common.initialize import random_model
from models.demo.train import read_text
from models.qwen3 import Qwen3, Qwen3Config

PROMPT = "It is a truth universally acknowledged, that"


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Most of these tests run the same two functions, and compiling them is most of the time."""
    options = dict(
        jax_compilation_cache_dir=str(tmp_path_factory.mktemp("xla")),
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def invoke(capsys, *args):
    """Exit status, standard output and standard error of the command."""
    status = command.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_demo_writes_words_and_greedy_text_is_deterministic(capsys):
    args = "--model", "demo", "--prompt", PROMPT, "--max-new-tokens", 40, "--implementation", "jit"
    status, text, summary = invoke(capsys, *args)
    assert status == 0 and text.startswith(PROMPT)
    words = text[len(PROMPT) :].split()
    novels = set(read_text().split())
    assert len(words) > 10 and sum(word in novels for word in words) > 0.8 * len(words)
    assert "40 new tokens" in summary and "tokens/s at batch 1" in summary and "jax.jit" in summary
    assert invoke(capsys, *args)[1] == text


def test_greedy_sequences_of_a_batch_are_the_same_and_sampled_ones_are_not(capsys):
    args = "--prompt", PROMPT, "--max-new-tokens", 24, "--batch", 2, "--implementation", "jit", "--dtype", "float32"
    mark = "\n--- sequence 2 of 2\n"
    first, second = invoke(capsys, *args)[1].split(mark)
    assert first.strip() == second.strip()
    sampled = [invoke(capsys, *args, "--temperature", 1, "--seed", seed)[1] for seed in (5, 5, 6)]
    first, second = sampled[0].split(mark)
    assert first.strip() != second.strip()
    assert sampled[0] == sampled[1] != sampled[2]


def test_random_weights_print_token_ids(capsys):
    status, text, summary = invoke(capsys, "--model", "llama-tiny", "--max-new-tokens", 5, "--implementation", "jit")
    assert status == 0 and len([int(token) for token in text[len(PROMPT) :].split()]) == 5
    assert "at random" in summary


def test_generation_stops_when_every_sequence_has_ended(capsys, monkeypatch):
    tokens = [np.array(pair) for pair in ([70, 71], [0, 72], [73, 0], [74, 75])]
    monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: iter(tokens))
    _, text, summary = invoke(capsys, "--prompt", "x", "--batch", 2, "--implementation", "jit")
    tokenizer = generation.load_tokenizer(registry.DEMO)
    first, second = text.split("\n\n--- sequence 2 of 2\n")
    assert first.strip() == "x" + tokenizer.decode([70]) and second.strip() == "x" + tokenizer.decode([71, 72])
    assert "3 new tokens" in summary


@pytest.mark.parametrize("length", [1, 64, 65])
def test_generated_tokens_do_not_depend_on_how_the_prompt_fills_its_blocks(length):
    """Against the plainest loop: the whole sequence again for every token."""
    model = random_model(Qwen3, Qwen3Config.tiny(num_layers=1), dtype=np.float32)
    ids = list(np.random.default_rng(0).integers(0, 256, length))
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    progress = []
    found = generation.generate(model, ids, max_new_tokens=4, on_prefill=progress.append)
    for token in found:
        padded = np.zeros((1, 80), np.int32)
        padded[0, : len(ids)] = ids
        logits, _ = forward(state, padded, model.init_cache(1, 80), np.int32(0))
        assert int(token[0]) == int(np.argmax(logits[0, len(ids) - 1]))
        ids.append(int(token[0]))
    assert len(ids) == length + 4 and progress[-1] == length


def test_the_decode_step_is_wrapped_and_its_cache_donated(monkeypatch):
    calls = []

    def megakernelize(step, *, implementation):
        calls.append(implementation)
        return lambda *args: (calls.append("traced"), step(*args))[1]

    monkeypatch.setitem(sys.modules, "jax_mpk", types.SimpleNamespace(megakernelize=megakernelize))
    lowered = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: (lowered.append(kwargs), jit(*args, **kwargs))[1])
    model = random_model(Qwen3, Qwen3Config.tiny(num_layers=1))
    wrap, _ = generation.choose_implementation("auto")
    list(generation.generate(model, [1], max_new_tokens=2, wrap=wrap))
    assert calls == [None, "traced"]
    for name, expected in (("none", None), ("cpu", "cpu"), ("cuda", "cuda"), ("xla", "xla")):
        generation.choose_implementation(name)[0](lambda: None)
        assert calls[-1] == expected
    # The decode step and the prefill.
    assert sum(kwargs.get("donate_argnums") == 2 for kwargs in lowered) == 2


def test_without_jax_mpk_auto_says_so_and_names_fail(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_mpk", None)
    args = "--model", "qwen3-tiny", "--max-new-tokens", 2
    status, _, err = invoke(capsys, *args)
    assert status == 0 and "running jax.jit" in err.splitlines()[0]
    status, _, err = invoke(capsys, *args, "--implementation", "cuda")
    assert status == 1 and err.startswith("error: --implementation cuda needs jax_mpk")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(prompt=[]), "the prompt has no tokens"),
        (dict(prompt=[1, 256]), "tokens outside of the model's vocabulary of 256"),
        (dict(prompt=[-1]), "tokens outside of the model's vocabulary of 256"),
        (dict(max_new_tokens=512), "1 prompt tokens and 512 new ones exceed the context of 512"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1, expected an integer from 0 to 16777216"),
        (dict(max_new_tokens=2.0), "max_new_tokens is 2.0, expected an integer"),
        (dict(batch=0), "batch is 0, expected an integer from 1 to 1024"),
        (dict(seed=1 << 32), "seed is 4294967296, expected an integer from 0 to 4294967295"),
        (dict(temperature=float("nan")), "temperature is nan, expected 0, or a number from 0.0001 to 10000"),
        (dict(temperature=-1.0), "temperature is -1.0, expected 0, or a number"),
        (dict(temperature=1e-9), "temperature is 1e-09, expected 0, or a number"),
    ],
)
def test_what_cannot_be_generated_is_refused(change, complaint):
    model = random_model(Qwen3, Qwen3Config.tiny(num_layers=1))
    arguments = dict(prompt=[1], max_new_tokens=2) | change
    with pytest.raises(UsageError, match=re.escape(complaint)):
        next(generation.generate(model, **arguments))


def test_the_coldest_and_the_warmest_sampling_and_the_largest_seed_work():
    model = random_model(Qwen3, Qwen3Config.tiny(num_layers=1), dtype=np.float32)
    greedy = [int(token[0]) for token in generation.generate(model, [1], max_new_tokens=8)]
    options = dict(max_new_tokens=8, seed=limits.SEED.high)
    cold, warm = (
        [int(token[0]) for token in generation.generate(model, [1], temperature=temperature, **options)]
        for temperature in (limits.TEMPERATURE.low, limits.TEMPERATURE.high)
    )
    assert cold == greedy and len(set(warm)) > 4
