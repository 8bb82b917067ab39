"""Every hand-built program compiles for every architecture, without spills, local memory or too many registers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compile import abstract_step
from jax_mpk import Options, _ext, abi, megakernelize
from jax_mpk.backends import cuda, cuda_build, cuda_source, nvrtc
from jax_mpk.errors import UnsupportedError

try:
    nvrtc.library()
except UnsupportedError:
    pytest.skip("no NVRTC in this environment", allow_module_level=True)

spec = importlib.util.spec_from_file_location("programs", Path(__file__).parents[1] / "device" / "programs.py")
assert spec and spec.loader
programs = sys.modules.setdefault("programs", importlib.util.module_from_spec(spec))
spec.loader.exec_module(programs)

CASES = {
    "chain": lambda: programs.decoder_step(1, 512, 1024, 2),
    "chain_columns_outer": lambda: programs.decoder_step(1, 512, 1024, 2, columns_inner=False),
    "chain_16": lambda: programs.decoder_step(16, 2048, 4096, 2),
    "chain_33": lambda: programs.decoder_step(33, 512, 1024, 1),
    "chain_f32": lambda: programs.decoder_step(2, 384, 640, 1, dtype="F32", stream=False),
    "attention_64": lambda: programs.attention_step(1, 8, 4, 64, 1024),
    "attention_128": lambda: programs.attention_step(3, 8, 4, 128, 1024),
    "attention_256": lambda: programs.attention_step(1, 1, 8, 256, 290),
    "attention_f32": lambda: programs.attention_step(1, 2, 3, 24, 50, "F32"),
    "rows": lambda: programs.rows_program(5, 1000),
    "sort": lambda: programs.sort_program(3, 2048, 50, True, True),
    "sort_long": lambda: programs.sort_program(3, 40000, 8, False, False),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("case", CASES)
def test_compiles(case, arch):
    source = cuda_source.generate(abi.decode(CASES[case]()), arch)
    used = nvrtc.compile(source.text, arch).resources()
    assert used["spill"] == 0 and used["stack"] == 0, used
    assert used["registers"] <= 96, used
    assert source.smem <= cuda_source.SMEM[arch]
    if arch == "sm_80":
        assert source.ring == 0 and "#define MPK_STREAM 0" in source.text


MODELS = {  # name, layers, batch, cache slots
    "qwen3-tiny": ("qwen3-tiny", None, 1, 64), "llama-tiny_3": ("llama-tiny", None, 3, 64),
    "llama-3.2-1b": ("llama-3.2-1b", 2, 1, 1000), "llama-3.2-1b_8": ("llama-3.2-1b", 2, 8, 1000),
    "qwen3-0.6b_8": ("qwen3-0.6b", 2, 8, 1000), "qwen3-8b": ("qwen3-8b", 2, 1, 1024), "qwen3-8b_16": ("qwen3-8b", 2, 16, 1024),
}  # fmt: skip
SPILL = 16
"""Bytes of stores and loads that the kernel of a model may spill: a word or two, outside its loops."""


@functools.cache
def program(case: str) -> abi.Program:
    """A decode step of full width, from shapes alone."""
    name, layers, batch, slots = MODELS[case]
    step, shapes = abstract_step(name, layers, batch, slots, jnp.bfloat16)
    options = Options(cache_dir="", cache_entries=0)
    return abi.decode(megakernelize(step, implementation="cuda", options=options).lower(*shapes).program)


@pytest.mark.parametrize(
    "case,arch", [*((c, "sm_90a") for c in MODELS), ("qwen3-tiny", "sm_80"), ("llama-tiny_3", "sm_100a")]
)
def test_models_compile(case, arch):
    source = cuda_source.generate(program(case), arch)
    used = nvrtc.compile(source.text, arch).resources()
    assert used["spill"] <= SPILL and used["registers"] <= 96, used
    assert source.smem <= cuda_source.SMEM[arch]
    if arch == "sm_90a":
        assert source.ring >= 8, "activations and accumulators leave room for a ring"


@pytest.mark.parametrize("case", ["chain", "chain_columns_outer", "chain_16"])
def test_a_frame_is_given_back_after_its_loads(case):
    """No order of memory says so (decision 44), so the address of every such arrival must depend on both loads before it."""
    reach: dict[str, set[int]] = {}  # register: the loads that its value depends on
    loads = arrivals = 0
    for line in nvrtc.ptx(cuda_source.generate(abi.decode(CASES[case]()), "sm_90a").text, "sm_90a").splitlines():
        registers = re.findall(r"%\w+", line)
        if "ldmatrix" in line:
            loads += 1
            reach |= {r: {loads} for r in registers[:4]}
        elif "mbarrier.arrive.shared" in line:
            assert {loads, loads - 1} <= reach.get(registers[0], set()), f"{line} waits for no load"
            arrivals += 1
        elif re.match(r"\s*(and|or|xor|lop3|shl|add|cvt|cvta|mad|mul|mov)\.", line):
            reach[registers[0]] = set().union(*(reach.get(r, set()) for r in registers[1:]))
    assert arrivals and loads == 2 * arrivals


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_the_read_only_stream_compiles(arch):
    used = nvrtc.compile((cuda_source.root() / "read.cu").read_text(), arch).resources()
    assert used["spill"] == 0 and used["registers"] <= 32, "four blocks of 512 threads on a multiprocessor"


def test_without_a_gpu_the_read_only_stream_says_so():
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="read-only stream cannot be measured: .*driver|no CUDA"):
            cuda.read_bandwidth(1 << 20)


def test_a_deep_model_has_the_code_of_a_shallow_one():
    few, many = (cuda_source.generate(abi.decode(programs.decoder_step(1, 512, 1024, n)), "sm_90a") for n in (2, 12))
    body = lambda s: [x for x in s.text.splitlines() if not x.startswith("#define MPK_BASES")]  # noqa: E731
    assert body(few) == body(many)
    assert len({u.variant for u in many.units}) == 2


def test_equal_inputs_give_equal_text():
    blob = programs.attention_step(1, 8, 4, 64, 1024)
    assert (
        cuda_source.generate(abi.decode(blob), "sm_90a").text == cuda_source.generate(abi.decode(blob), "sm_90a").text
    )


def test_plan_keeps_every_task_and_its_order():
    blob = programs.decoder_step(1, 512, 1024, 3)
    before = abi.decode(blob)
    e = cuda_build.build(blob, cuda_build.Device(workers=5))
    after = abi.decode(e.plan.blob)
    assert len(after["Task"]) == len(before["Task"]) and (np.diff(after["Task"]["worker"].astype(int)) >= 0).all()
    for w in range(5):
        mine = after["Task"][after["Task"]["worker"] == w]
        ops = mine["op"].astype(int) * 1000 + mine["index"]
        assert (np.diff(ops) > 0).all(), "a worker runs its tasks in linear order"
    s = after["Stream"]
    assert (after["Task"]["worker"][s["task"]] == s["worker"]).all() and (np.diff(s["task"].astype(int)) >= 0).all()
    assert s["frames"].sum() == before["Stream"]["frames"].sum()


def test_split_attention_has_parts_on_many_workers():
    e = cuda_build.build(programs.attention_step(1, 8, 4, 64, 1024), cuda_build.Device(workers=132))
    t = abi.decode(e.plan.blob)["Task"]
    assert len(t) == 128 and len(set(t["worker"].tolist())) == 128 and e.plan.tickets == 8
    assert sorted(zip(t["index"].tolist(), t["pad"].tolist(), strict=True)) == [
        (i, p) for i in range(8) for p in range(16)
    ]


def test_the_cubin_cache_is_by_content_and_survives_damage(tmp_path):
    """A cut file, the file of another source, a pipe: all are built again."""
    source, other = (cuda_source.generate(abi.decode(programs.rows_program(2, n)), "sm_90a").text for n in (40, 44))
    first = nvrtc.compile(source, "sm_90a", cache=tmp_path)
    assert nvrtc.compile(source, "sm_90a", cache=tmp_path) == nvrtc.Cubin(first.code, "")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert nvrtc.compile(source, "sm_90a", cache=tmp_path).code == first.code and file.read_bytes() == whole
    second = nvrtc.compile(other, "sm_90a", cache=tmp_path)
    (place,) = set(tmp_path.iterdir()) - {file}
    place.write_bytes(whole)
    assert nvrtc.compile(other, "sm_90a", cache=tmp_path).code == second.code != first.code
    file.unlink()
    os.mkfifo(file)
    thread = threading.Thread(target=nvrtc.compile, args=(source, "sm_90a"), kwargs={"cache": tmp_path}, daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive() and file.read_bytes() == whole


def test_a_site_takes_no_other_program_or_machine_code():
    """What the launcher holds: shared by equal sites alone, and only what is undamaged and belongs together."""
    one, two = (cuda_build.build(programs.rows_program(2, n), cuda_build.Device(workers=5)) for n in (40, 44))
    numbers = dict(smem=one.source.smem, spill=one.plan.spill, tickets=one.plan.tickets)
    site, held = _ext.cuda_code(one.plan.blob, one.cubin.code, **numbers)
    assert _ext.cuda_code(one.plan.blob, one.cubin.code, **numbers)[0] == site
    others = [_ext.cuda_code(one.plan.blob, one.cubin.code, **numbers | {k: n + 1}) for k, n in numbers.items()]
    others.append(_ext.cuda_code(two.plan.blob, two.cubin.code, **numbers))
    assert len({site, *(s for s, _ in others)}) == 5
    with pytest.raises(ValueError, match="machine code is not the one"):
        _ext.cuda_code(one.plan.blob, two.cubin.code, **numbers)
    at = abi.RECORDS["Header"].fields["hash"][1]
    forged = two.plan.blob[:at] + one.plan.blob[at : at + 64] + two.plan.blob[at + 64 :]
    with pytest.raises(ValueError, match="does not match its hash"):
        _ext.cuda_code(forged, one.cubin.code, **numbers)
    with pytest.raises(ValueError, match="not a program of version"):
        _ext.cuda_code(one.plan.blob[:-1], one.cubin.code, **numbers)
    del held, others
    assert _ext.cuda_code(one.plan.blob, one.cubin.code, **numbers)[1] is not None


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compile("__global__ void f() { g(); }", "sm_90a")
