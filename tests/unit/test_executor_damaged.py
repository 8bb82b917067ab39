"""Damaged programs with the hash of their content: refused with a reason, or harmless; and launches that cannot go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_mpk import _ext, abi
from jax_mpk.backends.cpu.check import check
from tests import damaged
from tests.unit import executor_builder as eb
from tests.unit.executor_builder import Access, Builder, Code, Stage, V, elementwise, instr
from tests.unit.test_executor_launch import build_standalone

INT_MAX, INT_MIN = (1 << 31) - 1, -(1 << 31)
DT = {name: abi.enum("Dtype", name) for name in abi.ENUMS["Dtype"]}


def test_damaged_programs_under_sanitizers(tmp_path: Path) -> None:
    """A few thousand programs; benchmarks/results/cpu_run3/damaged.txt has 100,000."""
    binary = build_standalone("address,undefined", "mpk_fuzz")
    files = damaged.write(tmp_path, damaged.programs(damaged.SOME))
    run = subprocess.run([binary, "--trials", "4000", *files], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "4000 damaged programs" in run.stdout


def test_the_fuzzer_says_which_trial_failed(tmp_path: Path) -> None:
    """A program that ends the process: its own check of intact programs does."""
    binary = build_standalone("address,undefined", "mpk_fuzz")
    (tmp_path / "none.mpk").write_bytes(b"no program at all")
    run = subprocess.run(
        [binary, "--seed", "5", "--from", "7", tmp_path / "none.mpk"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1 and "--seed 5 --from" in run.stderr


# --------------------------------------------------------------------------------------------------- what is refused


def edited(blob: bytes, section: str, changes: dict[str, Any], n: int = 0) -> bytes:
    """The program with fields of record `n` changed: name -> value, or (name, index) -> value."""
    p = abi.decode(blob)
    sections = {s: rows.copy() for s, rows in p.sections.items()}
    for key, value in changes.items():
        name, at = key if isinstance(key, tuple) else (key, None)
        if at is None:
            sections[section][name][n] = value
        else:
            sections[section][name][n, at] = value
    return abi.encode(sections, **p.settings)


def ramp() -> bytes:
    """out[i] = float(i), so its INDEX has an access that forms no address."""
    b = Builder()
    out = b.result(400)
    body = [instr("INDEX", V, aux=1), instr("I_TO_F", V + 1, V), instr("STORE", a=V + 1)]
    code = Code([Stage("VECTOR", body)], [Access(0, stride=(1,)), Access(0, "I32", stride=(1,))], {0: (0, 100)}, 0)
    b.tasks(b.op("ROWS", "ramp", (100,), (30,), [out], {"MAIN": [code]}))
    return b.blob()


def total() -> bytes:
    """out[i] = sum over j of x[i, j]."""
    b = Builder()
    slots = [b.arg(4 * 5 * 70), b.result(20)]
    stages = [
        Stage("REDUCE", [instr("LOAD", V)], axis=1, lo=(0,), hi=(70,), src=V, dst=3),
        Stage("SCALAR", [instr("STORE", a=3, aux=1)]),
    ]
    code = Code(stages, [Access(0, stride=(70, 1)), Access(1, stride=(1,))], {0: (0, 5)})
    b.tasks(b.op("ROWS", "total", (5,), (2,), slots, {"MAIN": [code]}))
    return b.blob()


def product(prologues: tuple[int, int] = (0, 0), rows: tuple[int, int] = (4, 4)) -> bytes:
    """Two contractions of one operand, in tiles of `rows` rows."""
    b = Builder()
    x, w = b.arg(4 * 6 * 20), b.arg(4 * 20 * 30)
    for j in range(2):
        out = b.result(4 * 6 * 30)
        b.tasks(eb.matmul(b, f"product{j}", x, w, out, 6, 30, 20, tile=(rows[j], 8), prologue=prologues[j]))
    return b.blob()


def chain() -> bytes:
    b = Builder()
    x, t, y = b.arg(400), b.temp(400), b.result(400)
    one = elementwise(b, "one", x, t, 100, 30, [instr("F_NEG", V + 1, V)], V + 1)
    two = elementwise(b, "two", t, y, 100, 30, [instr("F_NEG", V + 1, V)], V + 1)
    e = b.event(b.grids[one])
    b.tasks(one, (), (e,))
    b.tasks(two, (e,))
    return b.blob()


MAKE = {"ramp": ramp, "total": total, "product": product, "chain": chain}
REFUSED = {
    "an end before any start": ("ramp", "Code", {("hi", 0): INT_MIN}, "code 0: axis 0 goes from 0 to -2147483648"),
    "a start before the first": ("ramp", "Code", {("lo", 0): -1}, "code 0: axis 0 goes from -1"),
    "a slot that only INDEX has": ("ramp", "Access", {"slot": 500}, "names slot 500 of 1"),
    "scratch that does not exist": ("ramp", "Access", {"slot": abi.SLOT_ACC + 9}, "names slot 65305"),
    "a type that only INDEX has": ("ramp", "Access", {"dtype": 77}, "element type 77"),
    "terms that overflow": ("ramp", "Access", {("stride", 0): 1 << 62}, "strides or an offset beyond any buffer"),
    "an offset that overflows": ("ramp", "Access", {"offset": -(1 << 63)}, "strides or an offset beyond any buffer"),
    "an axis that is not there": ("ramp", "Code", {"axes": 3}, "loops over axes that operator 0 does not have"),
    "an opcode that is not there": ("ramp", "Instr", {"op": len(abi.ARITY)}, f"opcode {len(abi.ARITY)}"),
    "a register without a value": ("ramp", "Instr", {"a": V + 9}, "reads register 0x8009, which has no value"),
    "a register that is not declared": ("ramp", "Code", {"vector_regs": 1}, "names register 0x8001"),
    "registers that nobody has": ("ramp", "Code", {"vector_regs": 65}, "64 scalar and 65 vector registers"),
    "a scalar of a vector stage": ("ramp", "Instr", {"dst": 1}, "writes register 0x1 in a vector stage"),
    "accumulation on nothing": ("total", "Stage", {"flags": abi.ACCUMULATE}, "stage 0 reads register 0x3, which has no value"),
    "a reduction of nothing": ("total", "Stage", {"src": V + 1}, "stage 0 reads register 0x8001, which has no value"),
    "a range that is too long": ("total", "Stage", {("hi", 0): INT_MAX}, "reaches bytes"),
    "a range that is negative": ("total", "Stage", {("lo", 0): -5}, "range -5 to 70"),
    "a code of another kind": ("product", "Op", {("codes", abi.enum("Role", "MAIN")): 1}, "codes of role 0, which its kind"),
    "no such kind": ("product", "Op", {"kind": 6}, "kind 6"),
    "a tile of columns behind whole rows": ("product", "Op", {("tile", 2): 7}, "contracted axis 2 is tiled"),
    "too much scratch": ("product", "Op", {("extent", 0): 1 << 28, ("tile", 0): 1 << 28}, "scratch"),
    "a type beyond 8 bits": ("product", "Op", {("params", abi.enum("Param", "REDUCE_DTYPE")): 256}, "element type 256"),
    "more triggers than wanted": ("chain", "Event", {"threshold": 3}, "event 0 is triggered 4 times, its threshold is 3"),
    "a wait for less": ("chain", "Task", {("want", 0): 3}, "waits for 3 triggers of event 0, its threshold is 4"),
    "a name that does not end": ("chain", "Name", {"byte": 65}, "the last name does not end"),
    "a name beyond the end": ("chain", "Op", {"name": 1 << 30}, "operator 0 has a name beyond the end"),
    "a workspace of no alignment": ("chain", "Buffer", {"offset": 2}, "buffer 1 (is not aligned|ends at byte 402)"),
}  # fmt: skip
RECORD = {
    ("ramp", "Access"): 1,
    ("ramp", "Instr"): 1,
    ("chain", "Task"): 4,
    ("chain", "Name"): -1,
    ("chain", "Buffer"): 1,
}
"""The record that is damaged, where it is not the first."""


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    name, section, changes, message = REFUSED[what]
    blob = MAKE[name]()
    _ext.check(blob)
    n = 2 if what == "a register without a value" else RECORD.get((name, section), 0)
    n = 0 if what == "a scalar of a vector stage" else n
    with pytest.raises(_ext.ProgramError, match=message):
        _ext.check(edited(blob, section, changes, n))


def test_one_prologue_for_two_activations() -> None:
    """The second operator would take the first one's activation for its own, in another layout."""
    _ext.check(product((7, 7)))
    _ext.check(product((7, 8), (4, 3)))
    with pytest.raises(
        _ext.ProgramError, match="operator 1 has the prologue number of operator 0, but another activation"
    ):
        _ext.check(product((7, 7), (4, 3)))


def test_programs_that_are_endless_to_check() -> None:
    """A few hundred operators that all run a few hundred codes of all stages."""
    b = Builder()
    out = b.result(4)
    codes = [Code([Stage("SCALAR", [instr("CONST", 0)] * 200)] * 10, [Access(0)], {}) for _ in range(100)]
    for n in range(400):
        op = b.op("ROWS", f"op{n}", (), (), [out], {} if n else {"MAIN": codes})
        b.rows["Op"][op]["code"][0], b.rows["Op"][op]["codes"][0] = 0, 100
    for row in b.rows["Code"]:
        row["stage"], row["stages"] = 0, 1000
    with pytest.raises(_ext.ProgramError, match="its codes are too long together"):
        _ext.check(b.blob())


@pytest.mark.parametrize("nbytes, address", [(400, 1), (400, 2), (2, 1)])
def test_operands_that_are_not_aligned(nbytes: int, address: int) -> None:
    b = Builder()
    dtype = "F32" if nbytes == 400 else "BF16"
    x, y = b.arg(nbytes), b.result(nbytes)
    n = nbytes // (4 if dtype == "F32" else 2)
    body = [instr("LOAD", V), instr("STORE", a=V, aux=1)]
    code = Code([Stage("VECTOR", body)], [Access(0, dtype, stride=(1,)), Access(1, dtype, stride=(1,))], {0: (0, n)}, 0)
    b.tasks(b.op("ROWS", "copy", (n,), (n,), [x, y], {"MAIN": [code]}))
    memory = np.zeros(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64 + address
    with pytest.raises(ValueError, match="operand 0 is not aligned"):
        _ext.run(b.blob(), [memory[start : start + nbytes]], [np.zeros(nbytes, np.uint8)])


def test_the_compiler_refuses_nothing_that_the_executor_takes() -> None:
    """The two checks agree: what `emit.check` refuses, the loader refuses, but for events that nobody triggers."""
    rng = np.random.default_rng(2)
    blobs = list(damaged.programs(("softmax", "norm, two matmuls", "top k", "concatenate, argmax")).values())
    fields = [(s, f) for s in abi.SECTIONS for f in abi.RECORDS[s].names or ()]
    refused = 0
    for trial in range(1500):
        p = abi.decode(blobs[trial % len(blobs)])
        section, field = fields[rng.integers(len(fields))]
        if not len(p[section]):
            continue
        n = int(rng.integers(len(p[section])))
        now = p[section][field][n]
        at = int(rng.integers(now.size)) if now.ndim else None
        old = int(now if at is None else now.reshape(-1)[at])
        info = np.iinfo(now.dtype)
        new = [0, 1, old + 1, old - 1, info.max, info.min, old ^ (1 << int(rng.integers(info.bits - 1)))][
            rng.integers(7)
        ]
        key = field if at is None else (field, at)
        blob = edited(p.blob, section, {key: min(max(new, info.min), info.max)}, n)
        try:
            check(blob)
        except abi.ProgramError as e:
            if "less often" in str(e):
                continue
            refused += 1
            with pytest.raises(_ext.ProgramError):
                _ext.check(blob)
                print(f"{section}[{n}].{key} = {new}, was {old}: the compiler says {e}")
    assert refused > 100


# ------------------------------------------------------------------------------------------- launches that cannot go on

SCRIPT = """
import importlib.util, json, resource, sys
import numpy as np
spec = importlib.util.spec_from_file_location("jax_mpk._ext", sys.argv[1])
ext = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ext)
sizes, blobs = json.loads(sys.argv[2]), [open(f, "rb").read() for f in sys.argv[3:]]

def run(blob, **how):
    out = [np.zeros(n, np.uint8) for n in sizes[1]]
    ext.run(blob, [np.ones(n // 4, np.float32) for n in sizes[0]], out, **how)
    return [x.view(np.float32)[0].item() for x in out]

def virtual():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1]) << 10

def limit(more):
    resource.setrlimit(resource.RLIMIT_AS, (virtual() + more if more else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def script(
    tmp_path: Path, body: str, blobs: list[bytes], args: list[int], results: list[int], seconds: int = 120
) -> str:
    """Runs `SCRIPT` and `body` on programs with these operands in a process of its own; returns what it prints."""
    files = []
    for n, blob in enumerate(blobs):
        files.append(tmp_path / f"{n}.mpk")
        files[-1].write_bytes(blob)
    command = [sys.executable, "-c", SCRIPT + body, _ext.__file__, json.dumps([args, results]), *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, f"{run.returncode}: {run.stdout}{run.stderr}"
    return run.stdout


def large(rows: int, k: int) -> Builder:
    """A contraction with 4 * rows * k bytes of scratch over operands of one element; it has no tasks."""
    b = Builder()
    slots = [b.arg(4), b.result(4)]
    lhs = Code([Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
               [Access(0), Access(abi.SLOT_ACT, stride=(k, 0, 1))], {0: (0, rows), 2: (0, k)}, 2)  # fmt: skip
    end = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [Access(abi.SLOT_ACC), Access(1)],
        {0: (0, 1)},
        0,
    )
    params = dict(RHS0=0, N_RHS=1, N_M=1, N_N=1, N_K=1, REDUCE_DTYPE=DT["F32"])
    b.op("CONTRACT", "large", (rows, 1, k), (rows, 1, k), slots, {"LHS": [lhs], "EPILOGUE": [end]}, [Access(0)], params)
    return b


def two_workers(b: Builder, n: int = 1) -> bytes:
    """Adds an operator with a task for either worker, which takes a nanosecond or so n times: the result is 2."""
    body = [instr("LOAD", V), instr("F_ADD", V + 1, V, V), instr("STORE", a=V + 1, aux=1)]
    op = b.op(
        "ROWS",
        "twice",
        (n,),
        (n,),
        [0, 1],
        {"MAIN": [Code([Stage("VECTOR", body)], [Access(0), Access(1)], {0: (0, n)}, 0)]},
    )
    for worker in range(2):
        b.task(op, 0, worker)
    return b.blob()


def small() -> bytes:
    b = Builder()
    b.arg(4), b.result(4)
    return two_workers(b)


def test_want_of_memory_in_any_worker_ends_the_launch(tmp_path: Path) -> None:
    """Scratch of 1 GiB a thread, address space for none or for one: an error, and the pool works on."""
    body = """
out = [run(blobs[0], threads=2)]
for more in (1400 << 20, 100 << 20):
    for _ in range(3):
        limit(more)
        try:
            run(blobs[1], threads=2)
        except MemoryError as e:
            out.append(str(e))
        else:
            out.append("it ran")
        limit(0)
        out.append(run(blobs[0], threads=2))
    if more > 1 << 30:  # whoever got its memory then keeps it
        limit(0)
out.append(run(blobs[1], threads=2))
print(json.dumps(out))
"""
    big = two_workers(large(16, 1 << 24), 1 << 26)
    out = json.loads(script(tmp_path, body, [small(), big], [4], [4]))
    assert out[0] == [2.0] and out[-1] == [2.0] and out[2:-1:2] == [[2.0]] * 6
    assert all("out of memory: worker" in text and " bytes of scratch" in text for text in out[1:4:2]), out
    assert int(out[1].split("asked for ")[1].split()[0]) > 1 << 30


def test_xla_hears_of_want_of_memory(tmp_path: Path) -> None:
    (tmp_path / "big.mpk").write_bytes(two_workers(large(16, 1 << 24), 1 << 26))
    body = """
import resource, sys
import jax, numpy as np
from jax_mpk import abi
from jax_mpk.backends.cpu import backend as cpu
cpu.ready()
blob = open(sys.argv[1], "rb").read()
f = jax.jit(lambda x: jax.ffi.ffi_call(cpu.TARGET_NAME, [jax.ShapeDtypeStruct((1,), np.float32)])(
    x, program=np.frombuffer(blob, np.uint8), deadline_ms=np.int64(60000), threads=np.int64(2)))
x = jax.block_until_ready(jax.numpy.ones(1))
compiled = f.lower(x).compile()
now = int(next(y for y in open("/proc/self/status") if y.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20), resource.RLIM_INFINITY))
try:
    jax.block_until_ready(compiled(x))
except jax.errors.JaxRuntimeError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(compiled(x))
"""
    run = subprocess.run(
        [sys.executable, "-c", body, tmp_path / "big.mpk"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (
        "RESOURCE_EXHAUSTED" in run.stdout and " bytes of scratch" in run.stdout and "2." in run.stdout.splitlines()[-1]
    )


@pytest.mark.parametrize("kind", ["codes", "sums"])
@pytest.mark.parametrize("how", ["threads=1", "threads=2", "seed=3"])
def test_a_task_without_an_end_is_left(tmp_path: Path, kind: str, how: str) -> None:
    """Loops over 2**60 points that all read one element, and 2**44 multiply-adds of one element."""
    if kind == "codes":
        b = Builder()
        slots, n = [b.arg(4), b.result(4)], 1 << 30
        body = [instr("LOAD", V), instr("STORE", a=V, aux=1)]
        code = Code([Stage("VECTOR", body)], [Access(0), Access(1)], {0: (0, n), 1: (0, n)}, 1)
        op = b.op("ROWS", "endless", (n, n), (n, n), slots, {"MAIN": [code]})
    else:
        b = large(1 << 10, 1 << 17)
        row = b.rows["Op"][0]
        row["extent"][1] = row["tile"][1] = 1 << 17
        op, b.grids[0] = 0, 1
    e = b.event(1)
    b.task(op, 0, 0, (), (e,))
    b.task(elementwise(b, "after", 0, 1, 1, 1, [], V), 0, 1, (e,))
    body = f"""
try:
    run(blobs[0], {how}, deadline_ms=300)
except TimeoutError as e:
    print(e)
print(run(blobs[1], threads=2))
"""
    out = script(tmp_path, body, [b.blob(), small()], [4], [4]).splitlines()
    name = "endless" if kind == "codes" else "large"
    assert out[0].startswith(
        "deadline exceeded: worker 0, task 0 ("
        + name
        + "[0]) has not ended; 0 of 2 tasks are done, nothing finished for 300 ms"
    )
    assert out[1] == "[2.0]"
