"""``python -m models.generate`` as a process: every mistake, interruption and broken pipe ends in a status and a line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models import registry
from models.common.errors import TokenizerError
from models.common.tokenizer import load_tokenizer
from tests.models import hf_reference as reference

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "models.generate"]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": "", "PYTHONUNBUFFERED": ""}


def launch(*args, command=COMMAND, environment=None, **kwargs):
    """The ended process: ``returncode``, ``stdout`` and ``stderr`` (bytes, unless redirected)."""
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kwargs
    return subprocess.run(
        [*command, *args], cwd=ROOT, env=ENVIRONMENT | (environment or {}), timeout=120, check=False, **kwargs
    )


def error(done, status):
    """What the command said, which is no traceback, when it ended with ``status``."""
    message = done.stderr.decode()
    assert done.returncode == status, message
    assert "Traceback" not in message and "Exception ignored" not in message
    return message


SEED, POSITIVE = "expected an integer from 0 to 4294967295, not", "expected an integer from 1 to 1024, not"
TEMPERATURE = "expected 0, or a number from 0.0001 to 10000, not"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--prompt", b"\xff\xfe"], r"argument --prompt: expected text in UTF-8, not '\udcff\udcfe'"),
        (["--prompt", ""], "argument --prompt: the prompt has no tokens: it is empty"),
        (["--seed", "4294967296"], f"argument --seed: {SEED} '4294967296'"),
        (["--seed", "9" * 5000], f"argument --seed: {SEED} '9999"),
        (["--seed", "-1"], f"argument --seed: {SEED} '-1'"),
        (["--seed", "1.5"], f"argument --seed: {SEED} '1.5'"),
        (["--seed", "0x10"], f"argument --seed: {SEED} '0x10'"),
        (["--seed", b"\xff"], f"argument --seed: {SEED} '\\udcff'"),
        (["--weights-seed", "-1"], f"argument --weights-seed: {SEED} '-1'"),
        (["--temperature", "nan"], f"argument --temperature: {TEMPERATURE} 'nan'"),
        (["--temperature", "inf"], f"argument --temperature: {TEMPERATURE} 'inf'"),
        (["--temperature=-inf"], f"argument --temperature: {TEMPERATURE} '-inf'"),
        (["--temperature", "-1"], f"argument --temperature: {TEMPERATURE} '-1'"),
        (["--temperature", "1e-40"], f"argument --temperature: {TEMPERATURE} '1e-40'"),
        (["--temperature", "warm"], f"argument --temperature: {TEMPERATURE} 'warm'"),
        (["--max-new-tokens", "-1"], "argument --max-new-tokens: expected an integer from 0 to 16777216, not '-1'"),
        (["--max-new-tokens", "1e3"], "argument --max-new-tokens: expected an integer from 0 to 16777216, not '1e3'"),
        (["--batch", "0"], f"argument --batch: {POSITIVE} '0'"),
        (["--batch", "10000000000"], f"argument --batch: {POSITIVE} '10000000000'"),
        (["--checkpoint", ""], "argument --checkpoint: expected a directory, not ''"),
        (["--checkpoint", "x", "--weights-seed", "1"], "--weights-seed: not allowed with argument --checkpoint"),
        (["--implementation", "tpu"], "argument --implementation: invalid choice: 'tpu'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--top-p", "0.9"], "unrecognized arguments: --top-p 0.9"),
        ([b"--\xff"], r"unrecognized arguments: --\udcff"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:60],
)
def test_a_wrong_option_is_a_usage_error(args, complaint):
    assert complaint in error(launch(*args), 2)


def checkpoint(directory, **changes):
    """A checkpoint with the tokenizer of the demo, of the demo's vocabulary; without weights, which are not needed."""
    directory.mkdir()
    hf = json.loads((registry.DEMO / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(hf | changes))
    (directory / "tokenizer.json").write_bytes((registry.DEMO / "tokenizer.json").read_bytes())
    return directory


def in_process(capsys, *args):
    """As ``launch``, in this process, where JAX has been imported already: the status and standard error."""
    from models import generate

    status = generate.main([str(arg) for arg in args])
    return status, capsys.readouterr().err


def test_what_cannot_be_done_is_said_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    from models.generation import registry as used

    def forbidden(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(used, "load", forbidden)
    reference.write_checkpoint(tmp_path / "wrong", reference.QWEN3 | dict(head_dim=3), {})
    wide = checkpoint(tmp_path / "wide", num_key_value_heads=1000, num_attention_heads=1000, head_dim=1024)
    long = checkpoint(tmp_path / "long", max_position_embeddings=1 << 24)
    for args, status, complaint in [
        (["--model", "gpt-5"], 2, "no model is called 'gpt-5'; there are "),
        (["--model", "\x1b[2J"], 2, r"no model is called '\x1b[2J'; there are"),
        (["--prompt", "word " * 2000], 2, "prompt tokens and 128 new ones exceed the context of 1024"),
        (["--max-new-tokens", 16777216], 2, "and 16777216 new ones exceed the context of 1024"),
        (
            ["--checkpoint", long, "--max-new-tokens", 16 << 20, "--batch", 1024, "--prompt", "a"],
            2,
            "exceed the context",
        ),
        (
            ["--checkpoint", long, "--max-new-tokens", 16 << 19, "--batch", 1024],
            2,
            "sequences of 8388672 tokens takes 17,5",
        ),
        (["--checkpoint", wide, "--batch", 1024], 2, "the cache of 1024 sequences of 192 tokens takes 3,221.2 GB, but"),
        (["--checkpoint", tmp_path / "nowhere"], 1, f"config.json (there is no directory {tmp_path}/nowhere)"),
        (["--checkpoint", tmp_path / "wrong"], 1, f"{tmp_path}/wrong/config.json: 'head_dim' is 3, expected"),
        (["--checkpoint", tmp_path / "wrong", "--model", "gpt-5"], 2, "no model is called 'gpt-5'"),
        (
            ["--checkpoint", long, "--model", "qwen3-tiny"],
            1,
            "the checkpoint is not qwen3-tiny: its hidden_size is 192",
        ),
    ]:
        found, message = in_process(capsys, "--implementation", "jit", *args)
        assert found == status and complaint in message and message.startswith("error: "), message
    (long / "tokenizer.json").unlink()
    status, message = in_process(capsys, "--checkpoint", long)
    assert status == 1 and message == f"error: cannot read {long}/tokenizer.json: there is no such file\n"


def test_what_a_device_or_a_tokenizer_does_is_a_line_and_what_a_bug_does_is_not(capsys, monkeypatch):
    import jax

    import jax_mpk
    from models import generation

    for raised in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        MemoryError(),
        TokenizerError("the tokenizer cannot encode the text: none"),
        jax_mpk.UnsupportedError("dot", "not on this device"),
        jax_mpk.ExecutionError("worker 3 waits"),
        ZeroDivisionError("a bug"),
    ):

        def fail(*args, raised=raised, **kwargs):
            raise raised

        monkeypatch.setattr(generation, "generate", fail)
        if isinstance(raised, ZeroDivisionError):
            with pytest.raises(ZeroDivisionError):
                in_process(capsys)
        else:
            status, message = in_process(capsys)
            assert status == 1 and message == f"error: {str(raised) or 'out of memory'}\n"


@pytest.mark.parametrize(
    ("environment", "status", "complaint"),
    [
        (dict(JAX_PLATFORMS="nonsense"), 1, "error: Unable to initialize backend 'nonsense'"),
        (dict(JAX_MPK_THREADS="many"), 2, "error: JAX_MPK_THREADS='many': "),
    ],
)
def test_a_wrong_environment_is_one_line(environment, status, complaint):
    message = error(launch(environment=environment), status)
    assert complaint in message and len(message.splitlines()) == 1


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "flax.py").write_text("raise ModuleNotFoundError(\"No module named 'flax'\", name='flax')")
    message = error(launch(environment=dict(PYTHONPATH=str(tmp_path))), 1)
    assert message == "error: No module named 'flax'; the models need: pip install 'jax_mpk[models]'\n"


# Outputs that nobody reads


BRIEFLY = "--max-new-tokens", "0", "--prompt", "£"  # writes the prompt


def test_nobody_reads_the_text():
    """The other end of the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    assert error(launch(*BRIEFLY, stdout=write), 128 + signal.SIGPIPE) == ""
    assert launch("--seed", "-1", stderr=write).returncode == 128 + signal.SIGPIPE
    os.close(write)


def test_a_full_disk_is_said():
    with open("/dev/full", "wb") as full:
        assert error(launch(*BRIEFLY, stdout=full), 1) == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-"])
def test_a_closed_output_is_no_failure(closed):
    done = launch(command=["sh", "-c", f'"$0" -m models.generate --help {closed}', sys.executable])
    assert error(done, 0) == ""


def test_text_that_the_terminal_cannot_show_is_spelt_out():
    done = launch(*BRIEFLY, environment=dict(PYTHONIOENCODING="ascii"))
    error(done, 0)
    assert done.stdout == b"\\xa3\n"


# Ctrl-C

STRUCK = """
import hashlib, os, signal, sys, time
import numpy as np
from models import generate

def strike():
    os.kill(os.getpid(), signal.SIGINT)

def busy(*args, **kwargs):
    # Minutes of C without a look at signals, as a compilation is.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def struck(*args, **kwargs):
    strike()
    busy()

class Finder:
    def find_spec(name, *args):
        if name == "jax":
            struck()

where = sys.argv.pop(1)
if where == "import":
    sys.meta_path.insert(0, Finder)
elif where == "load":
    from models import generation
    generation.registry.load = struck
elif where == "compile":
    from models import generation
    generation.generate = struck
else:
    from models import generation
    generation.generate = lambda *args, **kwargs: iter(np.full((900, 1), 70))
    push, pushed = generation.StreamDecoder.push, []
    def strike_at_the_third(self, token):
        pushed.append(token)
        if len(pushed) == 3:
            strike()
            if where == "decode twice":
                time.sleep(0.5)
                struck()
            time.sleep(0.5)  # meanwhile the thread that watches has seen it
        return push(self, token)
    generation.StreamDecoder.push = strike_at_the_third
sys.exit(generate.process())
"""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("import", "interrupted\n"),
        ("load", "interrupted\n"),
        ("compile", "interrupted\n"),
        ("decode", "interrupted after 3 new tokens\n"),
        ("decode twice", "interrupted\n"),
    ],
)
def test_ctrl_c_ends_the_command_with_130_and_one_line(where, message):
    done = launch(where, "--implementation", "jit", command=[sys.executable, "-c", STRUCK])
    assert error(done, 130) == message
    if where == "decode":
        text = load_tokenizer(registry.DEMO).decode([70, 70, 70])
        assert done.stdout.decode() == f"It is a truth universally acknowledged, that{text}\n"
