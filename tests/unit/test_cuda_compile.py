"""Functions of every kind compile for every architecture, without spills, local memory or too many registers."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.compile import abstract_step
from jax_mpk import Options, _ext, abi, compiler, device, megakernelize
from jax_mpk.backends.cuda import backend as cuda
from jax_mpk.backends.cuda import nvrtc, source
from jax_mpk.backends.cuda.build import build, text
from jax_mpk.errors import UnsupportedError
from tests.device import programs

try:
    nvrtc.library()
except UnsupportedError:
    pytest.skip("no NVRTC in this environment", allow_module_level=True)


def chain(batch, d, ff, layers, dtype=programs.BF16, columns_inner=True):
    x, w = programs.chain_operands(batch, d, ff, layers, dtype)
    return programs.chain(dtype=dtype, columns_inner=columns_inner), (x, *programs.layout(w, columns_inner))


def attend(*shape, dtype=programs.BF16):
    return programs.attend, programs.attend_operands(*shape, dtype)


CASES = {
    "chain": lambda: chain(1, 512, 1024, 2),
    "chain_columns_outer": lambda: chain(1, 512, 1024, 2, columns_inner=False),
    "chain_16": lambda: chain(16, 2048, 4096, 2),
    "chain_33": lambda: chain(33, 512, 1024, 1),
    "chain_f32": lambda: chain(2, 384, 640, 1, np.float32),
    "attention_64": lambda: attend(1, 8, 4, 64, 1024),
    "attention_128": lambda: attend(3, 8, 4, 128, 1024),
    "attention_256": lambda: attend(1, 1, 8, 256, 290),
    "attention_f32": lambda: attend(1, 2, 3, 24, 50, dtype=np.float32),
    "rows": lambda: (programs.rows, (programs.rows_operand(5, 1000),)),
    "sort": lambda: (programs.sort(50, True, True), (programs.sort_operand(2048),)),
    "sort_long": lambda: (programs.sort(8, False, False), (programs.sort_operand(40000),)),
    "scan": lambda: (lambda x: jnp.cumsum(jax.nn.softmax(x), -1) * 2, (programs.rows_operand(5, 1000),)),
    "scan_long": lambda: (lambda x: lax.cumlogsumexp(x, 1, reverse=True), (programs.rows_operand(1, 128_256),)),
}


def compiled(f: Any, args: Any, gpu: device.Device = device.H100) -> abi.Program:
    closed = jax.make_jaxpr(f)(*args)
    return abi.decode(compiler.compile(closed, gpu, Options(cache_dir="", cache_entries=0)).program)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("case", CASES)
def test_compiles(case, arch):
    p = compiled(*CASES[case](), device.cuda(arch))
    used = nvrtc.compile(text(p), arch).resources()
    assert used["spill"] == 0 and used["stack"] == 0, used
    assert used["registers"] <= 96, used
    assert p["Kernel"][0]["shared"] <= device.cuda(arch).shared
    if arch == "sm_80":
        assert p["Kernel"][0]["ring"] == 0 and "#define MPK_STREAM 0" in text(p)


MODELS = {  # name, layers, batch, cache slots
    "qwen3-tiny": ("qwen3-tiny", None, 1, 64), "llama-tiny_3": ("llama-tiny", None, 3, 64),
    "llama-3.2-1b": ("llama-3.2-1b", 2, 1, 1000), "llama-3.2-1b_8": ("llama-3.2-1b", 2, 8, 1000),
    "qwen3-0.6b_8": ("qwen3-0.6b", 2, 8, 1000), "qwen3-8b": ("qwen3-8b", 2, 1, 1024), "qwen3-8b_16": ("qwen3-8b", 2, 16, 1024),
}  # fmt: skip
SPILL = 16
"""Bytes of stores and loads that the kernel of a model may spill: a word or two, outside its loops."""


def program(case: str, arch: str) -> abi.Program:
    """A decode step of full width, from shapes alone."""
    name, layers, batch, slots = MODELS[case]
    step, shapes = abstract_step(name, layers, batch, slots, jnp.bfloat16)
    options = Options(cache_dir="", cache_entries=0, arch=arch)
    return abi.decode(megakernelize(step, implementation="cuda", options=options).lower(*shapes).program)


@pytest.mark.parametrize(
    "case,arch", [*((c, "sm_90a") for c in MODELS), ("qwen3-tiny", "sm_80"), ("llama-tiny_3", "sm_100a")]
)
def test_models_compile(case, arch):
    p = program(case, arch)
    used = nvrtc.compile(text(p), arch).resources()
    assert used["spill"] <= SPILL and used["registers"] <= 96, used
    assert p["Kernel"][0]["shared"] <= device.cuda(arch).shared
    if arch == "sm_90a":
        assert p["Kernel"][0]["ring"] >= 8, "activations and accumulators leave room for a ring"


@pytest.mark.parametrize("case", ["chain", "chain_columns_outer", "chain_16"])
def test_a_frame_is_given_back_after_its_loads(case):
    """No order of memory says so (decision 44), so the address of every such arrival must depend on both loads before it."""
    reach: dict[str, set[int]] = {}  # register: the loads that its value depends on
    loads = arrivals = 0
    for line in nvrtc.ptx(text(compiled(*CASES[case]())), "sm_90a").splitlines():
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
    used = nvrtc.compile((source.root() / "read.cu").read_text(), arch).resources()
    assert used["spill"] == 0 and used["registers"] <= 32, "four blocks of 512 threads on a multiprocessor"


def test_without_a_gpu_the_read_only_stream_says_so():
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="read-only stream cannot be measured: .*driver|no CUDA"):
            cuda.read_bandwidth(1 << 20)


def test_a_deep_model_has_the_code_of_a_shallow_one():
    few, many = (compiled(*chain(1, 512, 1024, n)) for n in (2, 12))
    body = lambda p: [x for x in text(p).splitlines() if not x.startswith("#define MPK_BASES")]  # noqa: E731
    assert body(few) == body(many)
    assert len(set(many["Unit"]["variant"].tolist())) <= 4


def test_equal_inputs_give_equal_text():
    assert text(compiled(*attend(1, 8, 4, 64, 1024))) == text(compiled(*attend(1, 8, 4, 64, 1024)))


def test_every_task_is_there_and_in_order():
    p = compiled(*chain(1, 512, 1024, 3), replace(device.H100, workers=5))
    t, s = p["Task"], p["Stream"]
    extent, tile = p["Op"]["extent"].astype(int), np.maximum(p["Op"]["tile"].astype(int), 1)
    axes = np.arange(extent.shape[1]) < p["Op"]["n_axes"][:, None]
    assert (
        len(t) == np.where(axes, -(-extent // tile), 1).prod(1).sum() and (np.diff(t["worker"].astype(int)) >= 0).all()
    )
    assert (t["worker"][s["task"]] == s["worker"]).all() and (np.diff(s["task"].astype(int)) >= 0).all()
    assert s["frames"].sum() == 3 * (2 * 4 * 16 + 8 * 8), "512 x 1024, twice, and 1024 x 512, in frames of 128 x 64"


def test_split_attention_has_parts_on_many_workers():
    p = compiled(*attend(1, 8, 4, 64, 1024))
    op = int(np.flatnonzero(p["Unit"]["parts"] > 1)[0])
    t = p["Task"][p["Task"]["op"] == op]
    assert len(t) == 128 and len(set(t["worker"].tolist())) == 128 and p["Kernel"][0]["tickets"] == 8
    assert sorted(zip(t["index"].tolist(), t["part"].tolist(), strict=True)) == [
        (i, q) for i in range(8) for q in range(16)
    ]


def test_the_cubin_cache_is_by_content_and_survives_damage(tmp_path):
    """A cut file, the file of another source, a pipe: all are built again."""
    source, other = (text(compiled(programs.rows, (programs.rows_operand(2, n),))) for n in (40, 44))
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
    one, two = (build(compiled(programs.rows, (programs.rows_operand(2, n),)).blob, device.H100) for n in (40, 44))
    site, held = _ext.cuda_code(one.blob, one.cubin.code)
    assert _ext.cuda_code(one.blob, one.cubin.code)[0] == site
    other, held_too = _ext.cuda_code(two.blob, two.cubin.code)
    assert other != site
    p = abi.decode(one.blob)
    without = abi.encode({**p.sections, "Kernel": p["Kernel"][:0]}, key=p.key, **p.settings)
    with pytest.raises(ValueError, match="not one for CUDA"):
        _ext.cuda_code(without, one.cubin.code)
    with pytest.raises(ValueError, match="machine code is not the one"):
        _ext.cuda_code(one.blob, two.cubin.code)
    at = abi.RECORDS["Header"].fields["hash"][1]
    forged = two.blob[:at] + one.blob[at : at + 64] + two.blob[at + 64 :]
    with pytest.raises(ValueError, match="does not match its hash"):
        _ext.cuda_code(forged, one.cubin.code)
    with pytest.raises(ValueError, match="not a program of version"):
        _ext.cuda_code(one.blob[:-1], one.cubin.code)
    del held, held_too
    assert _ext.cuda_code(one.blob, one.cubin.code)[1] is not None


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compile("__global__ void f() { g(); }", "sm_90a")
