"""The benchmarks measure what they say; no test looks at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cell, decode, gate, latency, output, timing
from benchmarks import compile as compile_benchmark
from benchmarks.subject import plain, start, subject, upcast
from benchmarks.traffic import kv_bytes, step_traffic
from jax_mpk import Options
from models import registry
from models.common.initialize import num_bytes, random_model
from models.qwen3 import Qwen3, Qwen3Config

SLOTS = 32


@pytest.fixture(scope="module")
def tiny():
    return subject(random_model(Qwen3, Qwen3Config.tiny(num_layers=1)))


@pytest.fixture(scope="module")
def exact(tiny):
    return upcast(tiny.model)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One layer and a short stream: the tests are about structure."""
    monkeypatch.setattr(cell, "STREAM", (1 << 20, 1 << 20))
    family, preset = registry.PRESETS["qwen3-tiny"]
    monkeypatch.setitem(registry.PRESETS, "qwen3-tiny", (family, lambda: preset(num_layers=1)))


def shifted(by):
    """A wrapper whose step adds ``by(logits)`` to the logits and chooses its token from them."""

    def wrap(step):
        def worse(*args):
            _, logits, cache = step(*args)
            logits = logits + by(logits)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache

        return worse

    return wrap


def wave(size):
    return shifted(lambda logits: size * jnp.sin(jnp.arange(logits.shape[-1], dtype=jnp.float32)))


def lying(step):
    def wrapped(*args):
        token, logits, cache = step(*args)
        return (token + 1) % logits.shape[-1], logits, cache

    return wrapped


def check(made, wrap, exact, steps=4):
    return gate.check(made, wrap, exact, batch=2, slots=SLOTS, steps=steps)


def test_jit_passes_its_own_gate(tiny, exact):
    found = check(tiny, plain, exact)
    assert found.passed, found.failures
    assert found.ratio == 1
    assert found.tokens == 8 and found.first_position == SLOTS - 4
    assert 0 < found.jit_rms == found.rms < found.logits_rms


def test_float32_on_a_cpu_passes_at_the_floor():
    made = subject(random_model(Qwen3, Qwen3Config.tiny(num_layers=1), dtype=jnp.float32))
    found = check(made, wave(1e-6), upcast(made.model))
    assert found.passed, found.failures
    assert found.ratio == 1


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (wave(0.05), "rms error"),
        (wave(5.0), "decisive tokens"),
        (shifted(lambda logits: jnp.where(jnp.arange(logits.shape[-1]) == 3, jnp.nan, 0.0)), "rms error"),
        (shifted(lambda logits: jnp.where(jnp.arange(logits.shape[-1]) == 3, -0.5, 0.0)), "largest error"),
        (lying, "not the argmax"),
    ],
    ids=["noisy", "wrong", "nan", "one_logit", "lying"],
)
def test_the_gate_fails(tiny, exact, wrap, reason):
    found = check(tiny, wrap, exact)
    assert not found.passed
    assert any(reason in failure for failure in found.failures), found.failures
    assert str(found).startswith("FAIL")


def test_a_cache_that_is_not_written_fails(tiny, exact):
    def forgetful(step):
        def wrapped(state, token, cache, pos):
            following, logits, _ = step(state, token, cache, pos)
            return following, logits, cache

        return wrapped

    assert not check(tiny, forgetful, exact, steps=8).passed


def test_the_loop_is_its_steps(tiny, exact):
    run = cell.Contestant(tiny, plain, batch=2, context=SLOTS, steps=5)
    run()
    first = np.asarray(run.final)
    run()  # in the cache that the first run wrote
    np.testing.assert_array_equal(first, np.asarray(run.final))

    found = check(tiny, plain, exact, steps=1)
    gate.check_loop(found, tiny, plain, slots=SLOTS, steps=5, final=first)
    assert found.passed, found.failures
    gate.check_loop(found, tiny, plain, slots=SLOTS, steps=5, final=first + 1)
    assert not found.passed


def test_the_reference_has_the_same_weights(tiny, exact):
    for ours, theirs in zip(tiny.leaves, exact.leaves, strict=True):
        assert theirs.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs))
    assert jnp.dtype(exact.model.dtype) == jnp.float32


def test_the_start_is_the_same_every_time_and_differs_by_row(tiny):
    (token, cache), (again, same) = (start(tiny.model, 3, 8) for _ in range(2))
    assert len(set(np.asarray(token).tolist())) == 3
    np.testing.assert_array_equal(token, again)
    jax.tree.map(np.testing.assert_array_equal, cache, same)
    assert cache[0]["k"].shape == (3, 8, 2, 32) and cache[0]["k"].dtype == jnp.bfloat16
    assert not np.array_equal(cache[0]["k"], cache[0]["v"])


def test_traffic_reads_an_embedding_whole_only_if_it_is_the_head():
    tied = random_model(Qwen3, Qwen3Config.tiny())
    untied = random_model(Qwen3, Qwen3Config.tiny(tie_embeddings=False))
    assert step_traffic(tied, 3, 0).weights == num_bytes(tied)
    row = 64 * 2
    assert step_traffic(untied, 3, 0).weights == num_bytes(untied) - (256 - 3) * row
    assert kv_bytes(tied.config, 3, 2) == 2 * 2 * 3 * 2 * 32 * 2
    assert step_traffic(tied, 3, 10.5).kv == round(10.5 * kv_bytes(tied.config, 3, 2))
    assert step_traffic(tied, 3, 10.5).total == num_bytes(tied) + step_traffic(tied, 3, 10.5).kv


def test_contestants_take_turns():
    order = []
    seconds = timing.interleave({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


def test_summaries():
    stats = timing.summary([3.0, 1.0, 2.0, 10.0])
    assert (stats["median"], stats["min"], stats["max"]) == (2.5, 1.0, 10.0)
    assert stats["q1"] <= stats["median"] <= stats["q3"]
    assert timing.summary([2.0])["q1"] == 2.0
    assert timing.ratios([2.0, 9.0], [1.0, 3.0])["samples"] == [2.0, 3.0]


def test_json_is_strict(tmp_path):
    output.write_json(tmp_path / "x.json", {"a": [math.nan, 1.0], "b": (math.inf, "x")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": [None, "x"]}


def decode_document(tmp_path, *extra):
    file = tmp_path / "decode.json"
    argv = ["--model", "qwen3-tiny", "--context", "32", "--steps", "2", "--repeats", "2", "--gate-steps", "2"]
    return decode.main([*argv, "--json", str(file), *extra]), json.loads(file.read_text())


def test_decode_command(tmp_path, capsys):
    status, document = decode_document(tmp_path, "--implementation", "jit", "--batch", "2")
    assert status == 0
    assert {"date", "commit", "device", "packages", "cpu"} <= document["machine"].keys()
    assert [c["batch"] for c in document["cells"]] == [2]
    for c in document["cells"]:
        assert c["error"] is None and c["gate"]["passed"] and c["gate"]["steps"] == 2
        assert c["bandwidth"]["before"] > 0 and c["bandwidth"]["after"] > 0
        assert len(c["ratio"]["samples"]) == 2
        for who in ("jit", "candidate"):
            stats = c[who]["ms_per_step"]
            assert 0 < stats["min"] <= stats["median"] <= stats["max"]
            assert c[who]["tokens_per_s"] == pytest.approx(1e3 * c["batch"] / stats["median"])
            assert c[who]["share"] == pytest.approx(
                c["bytes"]["total"] * 1e3 / stats["median"] / max(c["bandwidth"]["before"], c["bandwidth"]["after"])
            )
    assert "qwen3-tiny" in capsys.readouterr().out


def test_without_a_gate(tmp_path):
    status, document = decode_document(tmp_path, "--implementation", "jit", "--no-gate")
    assert status == 0 and document["cells"][0]["gate"] is None


def test_a_candidate_that_raises_is_an_error_of_its_cell(tmp_path, monkeypatch, capsys):
    def broken(step):
        def wrapped(*args):
            raise NotImplementedError("no such thing")

        return wrapped

    monkeypatch.setattr(decode, "choose", lambda implementation: broken)
    status, document = decode_document(tmp_path)
    (c,) = document["cells"]
    assert status == 1
    assert c["error"] == "NotImplementedError: no such thing"
    assert c["candidate"] is None and c["gate"] is None and c["jit"]["tokens_per_s"] > 0
    assert "no such thing" in " ".join(capsys.readouterr().out.split())


def test_a_failed_gate_is_the_status(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "choose", lambda implementation: wave(0.5))
    status, document = decode_document(tmp_path)
    assert status == 1
    assert not document["cells"][0]["gate"]["passed"] and document["cells"][0]["gate"]["failures"]


@pytest.mark.parametrize(
    "argv", [["--model", "gpt"], ["--batch", "0"], ["--context", "x"], ["--steps", "0"], ["--context", "9999"]], ids=str
)
def test_wrong_arguments(argv):
    with pytest.raises(SystemExit):
        decode.parse(argv)


def test_latency_command(tmp_path, capsys):
    """Results are compared first, then both are timed; a busy process is started and ended."""
    file = tmp_path / "latency.json"
    argv = ["--case", "two operators", "--case", "int8 matvec, 2048", "--turn", "0.02", "--turns", "2", "--busy", "1"]
    assert latency.main([*argv, "--threads", "2", "--wide-first", "3", "--json", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert list(cases) == ["two operators", "int8 matvec, 2048"]
    for found in cases.values():
        for side in ("jit", "ours"):
            assert found[side]["n"] > 1 and found[side]["median"] <= found[side]["p99"] <= found[side]["max"]
    assert "two operators" in capsys.readouterr().out


def test_latency_refuses_to_time_what_is_wrong(monkeypatch):
    monkeypatch.setattr(latency, "megakernelize", lambda f, **how: lambda *a: jax.tree.map(lambda x: x + 1, f(*a)))
    with pytest.raises(AssertionError):
        latency.main(["--case", "two operators", "--turn", "0.01", "--turns", "1"])


def test_compile_needs_no_weights():
    step, shapes = compile_benchmark.abstract_step("qwen3-8b", 2, 4, 128, jnp.bfloat16)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    token, logits, cache = jax.eval_shape(step, *shapes)
    assert token.shape == (4,) and logits.shape == (4, 151_936) and len(cache) == 2


def test_growth():
    def case(layers, total):
        return {"layers": layers, "total": total, "seconds": {"x": total**2}}

    cases = [case(4, 1.0), case(8, 2.0), case(16, 4.0)]
    assert compile_benchmark.growth(cases) == pytest.approx(1)
    assert compile_benchmark.growth(cases, "x") == pytest.approx(2)
    assert compile_benchmark.growth(cases[:1]) is None


def test_compile_command(tmp_path, capsys):
    compiler = pytest.importorskip("jax_mpk.compiler", exc_type=ImportError)
    file = tmp_path / "compile.json"
    argv = ["--model", "qwen3-tiny", "--layers", "2", "--context", "32", "--json", str(file)]
    assert compile_benchmark.main(argv) == 0
    cases = json.loads(file.read_text())["models"]["qwen3-tiny"]
    assert [c["layers"] for c in cases] == [1]
    for c in cases:
        assert list(c["seconds"]) == ["trace", *(p.name for p in compiler.PASSES)]
        assert c["total"] == pytest.approx(sum(c["seconds"].values()))
        assert c["tasks"] > 0 and c["program_bytes"] > 0
    assert "verify" in capsys.readouterr().out


def test_a_set_of_knobs_is_typed_and_its_names_are_checked():
    from benchmarks import knobs

    assert knobs.options("ring=8,stream=off") == Options(ring=8, stream=False)
    for text, message in ({"ahead=8": "no knob is called ahead", "window=0": "at least 1"}).items():
        with pytest.raises(ValueError, match=message):
            knobs.options(text)


RUNS = sorted(p for p in (Path(__file__).parents[2] / "benchmarks" / "results").iterdir())


@pytest.mark.parametrize("run", RUNS, ids=lambda p: p.name)
def test_every_run_says_what_it_is(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["run"] == run.name and manifest["machine"] and manifest["tree"]
    assert sorted(manifest["files"]) == sorted(f.name for f in run.iterdir() if f.name != "manifest.json")
