"""Launching: threads, random orders, deadlines, errors, operands, damaged programs, and sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import decoders as spellings
from jax_mpk import _ext, abi
from jax_mpk.backends.cpu.operators import pressure
from jax_mpk.ir import interpret
from jax_mpk.kinds import contract, rows, sort
from jax_mpk.passes import refine
from tests.unit import executor_builder as eb
from tests.unit import test_emit
from tests.unit.executor_builder import Builder, V, elementwise, instr

ROOT = Path(__file__).parents[2]
THREADS = (1, 2, 3, 8)
SHAPE = spellings.Shape(layers=2, width=24, heads=4, kv_heads=2, head=8, hidden=20, vocab=40, slots=7)


def decoder() -> tuple[Any, tuple[Any, ...]]:
    """A decode step with attention, appends, norms and an argmax, and its arguments."""
    tables = (spellings.NORMS, spellings.ROPES, spellings.UPDATES, spellings.ATTENTIONS)
    names = dict(zip(("norm", "rope", "update", "attend"), (next(iter(t)) for t in tables), strict=True))
    w, c = spellings.weights(SHAPE, np.float32), spellings.cache(SHAPE, 2, np.float32)
    return spellings.decoder(SHAPE, **names), (w, np.arange(3, 5, dtype=np.int32), c, np.int32(3))


def compiled(f: Any, args: tuple[Any, ...]) -> tuple[bytes, list[np.ndarray], list[np.ndarray]]:
    """The program of the fused graph, cut small; its flat operands; the results that the interpreter gives."""
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    g = test_emit.graphs(f, *args)[1]
    return test_emit.finish(refine.run(g, pressure)), flat, interpret.run(g, flat)


def raw(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]


def execute(blob: bytes, flat: list[np.ndarray], like: list[np.ndarray], **how: Any) -> list[np.ndarray]:
    out = [np.zeros(w.shape, w.dtype) for w in like]
    _ext.run(blob, raw(flat), [o.reshape(-1).view(np.uint8) for o in out], poison=True, **how)
    return out


def bits(arrays: list[np.ndarray]) -> list[bytes]:
    return [a.tobytes() for a in arrays]


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, sort):
        monkeypatch.setattr(module, "MIN_COST", 64)
    monkeypatch.setattr(contract, "MIN_MACS", 256)


# ------------------------------------------------------------------------------------------------ compiled programs


@pytest.mark.parametrize("name", test_emit.CASES)
def test_compiled_functions(name: str) -> None:
    """What the compiler makes of functions of every kind: right, and the same bits in every order."""
    f, args = test_emit.CASES[name]
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    for g in test_emit.graphs(f, *args):
        blob, want = test_emit.finish(refine.run(g, pressure)), interpret.run(g, flat)
        have = execute(blob, flat, want, threads=1)
        for i, (x, y) in enumerate(zip(have, want, strict=True)):
            test_emit.close(x, y, f"{name}, result {i}")
        for how in [dict(threads=n) for n in THREADS[1:]] + [dict(seed=n) for n in range(5)]:
            assert bits(execute(blob, flat, want, **how)) == bits(have), how
        for i, (x, y) in enumerate(zip(execute(blob, flat, want, isa="plain"), want, strict=True)):
            test_emit.close(x, y, f"{name}, result {i}, plain")


def test_a_decoder_in_every_order() -> None:
    blob, flat, want = compiled(*decoder())
    assert len(abi.decode(blob)["Task"]) > 20
    have = execute(blob, flat, want, threads=1)
    for x, y in zip(have, want, strict=True):
        test_emit.close(x, y)
    for n in THREADS:
        for _ in range(5):
            assert bits(execute(blob, flat, want, threads=n)) == bits(have)
    for seed in range(50):
        assert bits(execute(blob, flat, want, seed=seed)) == bits(have), seed


def test_concurrent_launches_of_one_program() -> None:
    """The pool belongs to one launch at a time; the others run alone, with counters of their own."""
    blob, flat, want = compiled(*decoder())
    have = bits(execute(blob, flat, want, threads=1))
    wrong: list[int] = []

    def many(n: int) -> None:
        for i in range(20):
            if bits(execute(blob, flat, want, threads=1 + (n + i) % 4)) != have:
                wrong.append(n)

    threads = [threading.Thread(target=many, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_forked_child_launches() -> None:
    b = Builder()
    x, y = b.arg(4000), b.result(4000)
    b.tasks(elementwise(b, "neg", x, y, 1000, 10, [instr("F_NEG", V + 1, V)], V + 1))
    blob, data, out = b.blob(), np.ones(1000, np.float32), np.zeros(1000, np.float32)
    _ext.run(blob, [data], [out], threads=3)
    pid = os.fork()
    if pid == 0:
        out[:] = 0
        _ext.run(blob, [data], [out], threads=3)
        os._exit(0 if np.all(out == -1) else 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


# ------------------------------------------------------------------------------------------------------- deadlines


def chain(n: int = 6, threshold: int = 1, skip: int = -1) -> bytes:
    """n operators in a row, each on what the one before wrote; the operator `skip` does not trigger its event."""
    b = Builder(workers=3)
    buffers = [b.arg(400), *(b.temp(400) for _ in range(n - 1)), b.result(400)]
    for i in range(n):
        ops = [instr("CONST", V + 1, imm=1.0), instr("F_ADD", V + 2, V, V + 1)]
        op = elementwise(b, f"add{i}", buffers[i], buffers[i + 1], 100, 100, ops, V + 2)
        e = b.event(threshold)
        b.task(op, 0, i, (e - 1,) if i else (), () if i == skip else (e,))
    return b.blob()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_missing_trigger_ends_with_an_error_and_the_next_launch_works(threads: int) -> None:
    x, y = np.zeros(100, np.float32), np.zeros(100, np.float32)
    start = time.monotonic()
    with pytest.raises(TimeoutError) as e:
        _ext.run(chain(skip=2), [x], [y], threads=threads, deadline_ms=200)
    assert time.monotonic() - start < 30
    text = r"worker (\d+), task 3 \(add3\[0\]\) waits for event 2: have 0, want 1; 3 of 6 tasks"
    found = re.search(text, str(e.value))
    assert found and int(found[1]) == 3 % threads
    for _ in range(3):
        _ext.run(chain(), [x], [y], threads=threads, deadline_ms=200)
        assert np.all(y == 6)


def test_a_random_order_reports_a_missing_trigger() -> None:
    x, y = np.zeros(100, np.float32), np.zeros(100, np.float32)
    with pytest.raises(TimeoutError, match=r"task 3 \(add3\[0\]\) waits for event 2: have 0, want 1"):
        _ext.run(chain(skip=2), [x], [y], seed=1)


def test_a_failed_launch_leaves_no_counts_behind() -> None:
    """The same program, failing again and again, says the same: have is counted from the start of the launch."""
    x, y = np.zeros(100, np.float32), np.zeros(100, np.float32)
    blob, texts = chain(threshold=2), set()
    for _ in range(3):
        with pytest.raises(TimeoutError) as e:
            _ext.run(blob, [x], [y], threads=1)
        texts.add(str(e.value))
    assert len(texts) == 1 and "have 1, want 2" in texts.pop()


def test_many_epochs() -> None:
    """Counters go on from launch to launch."""
    x, y, blob = np.zeros(100, np.float32), np.zeros(100, np.float32), chain()
    for _ in range(300):
        y[:] = 0
        _ext.run(blob, [x], [y], threads=2)
        assert y[0] == 6


def test_progress_extends_the_deadline() -> None:
    """The deadline is for a launch in which nothing finishes, not for a long one."""
    b = Builder(workers=2)
    n, rows = 2_000_000, 12
    x, y = b.arg(4 * n), b.result(4 * n)
    ops = [instr("F_SIN", V + 1, V)] + [instr("F_SIN", V + 1 + i, V + i) for i in range(1, 12)]
    op = elementwise(b, "slow", x, y, n, n // rows, ops, V + 12)
    e = b.event(b.grids[op])
    for i in range(b.grids[op]):
        b.task(op, i, 0, (), (e,))
    b.task(elementwise(b, "end", x, y, 16, 16, [], V), 0, 1, (e,))
    data, out = np.zeros(n, np.float32), np.zeros(n, np.float32)
    start = time.monotonic()
    _ext.run(b.blob(), [data], [out], threads=1)
    whole = 1000 * (time.monotonic() - start)
    _ext.run(b.blob(), [data], [out], threads=2, deadline_ms=max(100, int(whole / 2)))


# -------------------------------------------------------------------------------------------------------- operands


def test_operands_that_do_not_fit() -> None:
    blob = chain()
    x, y = np.zeros(100, np.float32), np.zeros(100, np.float32)
    with pytest.raises(ValueError, match="1 operands and 1 results, the call 2 and 1"):
        _ext.run(blob, [x, x], [y])
    with pytest.raises(ValueError, match="operand 0 has 396 bytes, not 400"):
        _ext.run(blob, [x[:99]], [y])
    with pytest.raises(ValueError, match="result 0 has 4 bytes"):
        _ext.run(blob, [x], [y[:1]])
    with pytest.raises((ValueError, BufferError)):
        _ext.run(blob, [np.zeros((100, 2), np.float32)[:, 0]], [y])
    with pytest.raises((ValueError, BufferError)):
        _ext.run(blob, [x], [b"\0" * 400])
    with pytest.raises(ValueError, match="no instruction set"):
        _ext.run(blob, [x], [y], isa="z80")


def test_an_aliased_result_starts_from_its_operand() -> None:
    b = Builder()
    x = b.arg(400)
    y = b.result(400, alias=0)
    b.tasks(elementwise(b, "part", x, y, 50, 20, [instr("F_NEG", V + 1, V)], V + 1))
    data, out = np.arange(1, 101, dtype=np.float32), np.zeros(100, np.float32)
    _ext.run(b.blob(), [data], [out], poison=True)
    np.testing.assert_array_equal(out[:50], -data[:50])
    np.testing.assert_array_equal(out[50:], data[50:])


# --------------------------------------------------------------------------------------------------------- damage


def rehash(blob: bytearray) -> bytes:
    """The blob with the hash of its content, so that only the loader's other checks can refuse it."""
    at = abi.RECORDS["Header"].fields["hash"][1]
    blob[at : at + 32] = abi.content_hash(bytes(blob))
    return bytes(blob)


def test_damaged_programs_are_refused_or_harmless() -> None:
    """Bit flips with a matching hash. What loads is run too: it may neither crash nor go on for ever."""
    blob, flat, want = compiled(*decoder())
    rng = np.random.default_rng(11)
    p = abi.decode(blob)
    used = [
        (int(at), int(n) * abi.RECORDS[s].itemsize)
        for s, at, n in zip(abi.SECTIONS, p.header["section_offset"], p.header["section_count"], strict=False)
        if n
    ]
    refused = ran = 0
    for trial in range(3000):
        damaged = bytearray(blob)
        at, size = used[rng.integers(len(used))] if trial % 8 else (0, abi.RECORDS["Header"].itemsize)
        for _ in range(rng.integers(1, 4)):
            damaged[at + rng.integers(size)] ^= 1 << rng.integers(8)
        whole = rehash(damaged)
        try:
            _ext.check(whole)
        except _ext.ProgramError as e:
            refused += 1
            assert str(e)
            continue
        ran += 1
        try:
            execute(whole, flat, want, threads=1 + trial % 2, deadline_ms=50)
        except (TimeoutError, ValueError, MemoryError):  # the last: a workspace that no machine has
            pass
    assert refused > 500 and ran > 500


def test_arbitrary_bytes_are_refused() -> None:
    rng = np.random.default_rng(0)
    size = abi.RECORDS["Header"].itemsize
    for n in (0, 1, size - 1, size, 5000):
        with pytest.raises(_ext.ProgramError):
            _ext.check(rng.integers(0, 256, n, np.uint8).tobytes())
    head = np.zeros((), abi.RECORDS["Header"])
    head["magic"], head["version"], head["bytes"] = abi.MAGIC, abi.VERSION + 1, head.nbytes
    with pytest.raises(_ext.ProgramError, match=f"format version {abi.VERSION + 1}"):
        _ext.check(head.tobytes())


def test_errors_of_the_loader_name_the_record() -> None:
    b = Builder()
    x, y = b.arg(400), b.result(396)
    b.tasks(elementwise(b, "neg", x, y, 100, 10, [instr("F_NEG", V + 1, V)], V + 1))
    with pytest.raises(_ext.ProgramError, match=r"operator 0: instruction 2 reaches bytes 0 to 400 of 396"):
        _ext.check(b.blob())
    b = Builder()
    x = b.arg(400)
    b.tasks(elementwise(b, "neg", x, x, 100, 10, [instr("F_NEG", V + 1, V)], V + 1))
    with pytest.raises(_ext.ProgramError, match="stores to an operand"):
        _ext.check(b.blob())


# ------------------------------------------------------------------------------------------------------ sanitizers


def build_standalone(sanitizer: str, binary: str) -> Path:
    """A standalone binary, kept in build/ from run to run."""
    cmake = shutil.which("cmake") or pytest.fail("cmake is part of the test environment")
    folder = ROOT / "build" / sanitizer
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DMPK_STANDALONE=ON", f"-DMPK_SANITIZE={sanitizer}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in ([*configure, *generator], [cmake, "--build", str(folder), "-j1", "--target", binary]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / binary


def test_thread_sanitizer(tmp_path: Path) -> None:
    """Launches from four threads at once, on one to four threads each: no data race, no other bits."""
    files = []
    cases = [decoder(), *(test_emit.CASES[n] for n in ("softmax", "norm, two matmuls", "top k", "scatter add"))]
    for n, (f, args) in enumerate(cases):
        files.append(tmp_path / f"program{n}.mpk")
        files[-1].write_bytes(compiled(f, args)[0])
    run = subprocess.run(
        [build_standalone("thread", "mpk_stress"), *files], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stdout + run.stderr
    assert run.stdout.count("0 of 100 launches differ") == len(files)


def test_builder_matches_the_compiler_on_slots() -> None:
    """The hand-built programs of these tests pass the compiler's own checker."""
    from jax_mpk.backends.cpu.check import check

    check(chain())
    b = Builder()
    slots = b.arg(4 * 6 * 20), b.arg(4 * 20 * 30), b.result(4 * 6 * 30)
    b.tasks(eb.matmul(b, "matmul", *slots, 6, 30, 20, tile=(4, 8)))
    check(b.blob())
