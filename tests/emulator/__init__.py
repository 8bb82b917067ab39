"""Runs the generated CUDA source of a program on the host: every CUDA thread is a fiber, in an order drawn from a seed.

This executes the very text that NVRTC compiles, with `cuda/runtime/ptx.cuh` replaced by `device.h`, so task bodies, the kernel
shell, the weight stream and the plan are tested where there is no GPU. Memory is sequentially consistent here; what the
GPU's memory model does not order is found by `races.h`. What it cannot show: timing, and instructions that the
replacement spells differently.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_mpk import abi
from jax_mpk.abi import launch
from jax_mpk.backends.cuda import source
from jax_mpk.backends.cuda.build import text as text_of

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", f"-I{HERE}", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-strict-aliasing",
         "-fwrapv", "-fno-stack-protector"]  # fmt: skip
INSTRUMENTED = ["-g1", "-fsanitize=thread", "--param=tsan-distinguish-volatile=1"]
MOST = 1 << 28
MAP = np.dtype([("base", "<u8"), ("dims", "<u8", 4), ("strides", "<u8", 3), ("box", "<u4", 4), ("pad", "u1", 48)])


RACE = np.dtype(
    [("name", "<i4"), ("pad", "<u4"), ("offset", "<u8"), ("threads", "<u4", 2), ("wrote", "<u4", 2), ("pc", "<u8", 2)]
)


class Race(AssertionError):
    """Two accesses to a byte, one of them a write, that nothing orders."""


class Deadlock(AssertionError):
    """Every thread waits for another, or the program ran for too many steps."""


@functools.cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jax_mpk_emulator")


def _library(name: str, source: str, mode: int = ctypes.RTLD_LOCAL, flags: Sequence[str] = ()) -> ctypes.CDLL:
    key = hashlib.sha256("\n".join([*flags, source]).encode()).hexdigest()[:16]
    out = Path(_directory().name) / f"{name}_{key}"
    if not out.with_suffix(".so").exists():
        out.with_suffix(".cc").write_text(source)
        subprocess.run(["g++", *FLAGS, *flags, "-c", f"{out}.cc", "-o", f"{out}.o"], check=True)
        subprocess.run(["g++", "-shared", f"{out}.o", "-o", f"{out}.so"], check=True)
    return ctypes.CDLL(f"{out}.so", mode=mode)


@functools.cache
def _runtime() -> ctypes.CDLL:
    lib = _library("fibers", (HERE / "fibers.cc").read_text(), ctypes.RTLD_GLOBAL, ["-O2"])
    lib.emulated_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 3, *[ctypes.c_uint64] * 2]
    lib.emulated_watch.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    lib.emulated_races.argtypes = [ctypes.c_void_p]
    return lib


def _host(text: str) -> str:
    """The generated source as the host compiler takes it."""
    ptx = (source.root() / "runtime" / "ptx.cuh").read_text().replace("#pragma once", "")
    assert ptx in text
    text = text.replace(ptx, "")
    text = text.replace("extern __shared__ __align__(1024) u8 smem[];", "u8* const smem = emulated_thread->shared;")
    entry = 'extern "C" __attribute__((visibility("default"))) void emulated_entry(const void* p) { mpk_program(*(const mpk::Launch*)p); }'
    # The shell names its own fixed-width types; the host compiler's headers are not included at all.
    own = f"#pragma GCC visibility push(hidden)\n{text}\n#pragma GCC visibility pop"  # libraries of two programs must not mix
    return f'#include "{HERE / "device.h"}"\n#define __CUDACC_RTC__\n{own}\n{entry}\n'


@dataclass
class Status:
    """What a launch that gave up says of itself; `code` 0: it did not."""

    code: int
    worker: int
    task: int
    event: int
    have: int
    want: int
    name: str = ""


class Site:
    """A program with its tables and counters: `site(operands)` is one launch and gives the results' bytes. It raises
    `Race` where two threads' accesses to shared memory, the workspace or a result have no order."""

    def __init__(self, blob: bytes, limit_steps: int = 1 << 40):
        self.program = p = abi.decode(blob)
        self.text, self.kernel = text_of(p), p["Kernel"][0]
        self.grid = workers = int(p.header["workers"])
        _runtime()
        self.library = _library("kernel", _host(self.text), flags=INSTRUMENTED)
        self.entry = ctypes.cast(self.library.emulated_entry, ctypes.c_void_p)
        first, stream_first = (
            np.searchsorted(p[s]["worker"], np.arange(workers + 1)).astype(np.uint32) for s in ("Task", "Stream")
        )
        slots = p["Slot"].copy()
        buffers = p["Buffer"]
        for s in slots:
            b = buffers[int(s["buffer"])]
            s["buffer"], s["offset"] = self._base(b), int(s["offset"]) + int(b["offset"])
        self.maps = np.zeros(max(1, len(p["TensorMap"])), MAP)
        self.status = np.zeros(1, launch.RECORDS["Status"])
        self.const = p["Const"]["byte"].copy() if len(p["Const"]) else np.zeros(64, np.uint8)
        tables = dict(tasks=p["Task"].copy(), first=first, units=p["Unit"].copy(), slots=slots, stream=p["Stream"].copy(),
                      stream_first=stream_first, maps=self.maps, status=self.status,
                      counters=np.zeros(len(p["Event"]) * launch.EVENT_WORDS + 1, np.uint32),
                      tickets=np.zeros(int(self.kernel["tickets"]) + 1, np.uint32))  # fmt: skip
        self.tables = tables
        self.state = np.zeros(1, launch.RECORDS["State"])
        for name, table in tables.items():
            self.state[name] = table.ctypes.data
        self.state["limit_ns"], self.state["spill"] = limit_steps * 1000, self.kernel["spill_at"]
        self.state["counter_words"] = len(p["Event"]) * launch.EVENT_WORDS
        self.state["ticket_words"], self.state["epoch"] = self.kernel["tickets"], 1

    def _base(self, b: np.void) -> int:
        space, h = int(b["space"]), self.program.header
        at = {"ARG": int(b["index"]), "RESULT": int(h["args"]) + int(b["index"]),
              "WORKSPACE": int(h["args"]) + int(h["results"])}  # fmt: skip
        return at.get(abi.ENUMS["Space"][space], int(h["args"]) + int(h["results"]) + 1)

    def __call__(
        self, operands: Sequence[np.ndarray], results: Sequence[np.ndarray], seed: int = 0, most: int = MOST
    ) -> Status:
        """Runs on the arrays in place. Results that live in an operand are the same array in both lists."""
        workspace = np.full(int(self.program.header["workspace"]) + 256, 0x7B, np.uint8)
        held = [*operands, *results, workspace[-workspace.ctypes.data % 256 :], self.const]
        bases = np.array([self.state.ctypes.data, *(x.ctypes.data for x in held)], np.uint64)
        for m, t in zip(self.maps, self.program["TensorMap"], strict=False):
            self._encode(m, t, held)
        self.status[:] = 0
        smem = int(self.kernel["shared"])
        run = _runtime()
        run.emulated_watch(None, 0, 0)
        for n, x in enumerate([*results, held[-2]]):
            run.emulated_watch(x.ctypes.data, x.nbytes, n)
        code = run.emulated_run(self.entry, bases.ctypes.data, self.grid, launch.BLOCK, smem, seed, most)
        if code:
            raise Deadlock(("", "every thread waits for another", f"not done after {most} steps")[code])
        self._report([*(f"result {n}" for n in range(len(results))), "workspace"])
        s = self.status[0]
        name = ""
        if s["code"]:
            name = self.program.name(int(self.program["Unit"]["name"][int(self.program["Task"]["op"][int(s["task"])])]))
        return Status(
            *(int(s[n]) for n in ("code", "worker", "task", "event")),
            int(s["have"].astype(np.int32)),
            int(s["want"]),
            name,
        )

    def run(self, runner: Any, seed: int = 0) -> list[np.ndarray]:
        """The results of a launch on copies of a `Runner`'s operands; results that are no operand's start as noise."""
        args = [x.copy() for x in runner.args]
        results = []
        for n, s in enumerate(runner.shapes):
            old = runner.alias.get(n, -1)
            noise = np.full(math.prod(s.shape) * np.dtype(s.dtype).itemsize, 0x7B, np.uint8)
            results.append(args[old] if old >= 0 else noise.view(s.dtype).reshape(s.shape))
        status = self(args, results, seed=seed)
        if status.code:
            raise Deadlock(f"the launch gave up: {status}")
        return results

    def _encode(self, m: np.void, t: np.void, held: Sequence[np.ndarray]) -> None:
        """As Site::encode of ffi/cuda/launcher.cc: four axes, unused ones of extent 1."""
        b = self.program["Buffer"][int(t["buffer"])]
        m["base"] = held[self._base(b)].ctypes.data + int(b["offset"]) + int(t["offset"])
        rank = int(t["rank"])
        m["dims"], m["box"], m["strides"] = 1, 1, 16
        m["dims"][:rank], m["box"][:rank] = t["dims"][:rank], t["box"][:rank]
        m["strides"][: rank - 1] = t["strides"][1:rank]

    def _report(self, names: Sequence[str]) -> None:
        found = np.zeros(16, RACE)
        count = _runtime().emulated_races(found.ctypes.data)
        if not count:
            return
        text = []
        for r in found[:count]:
            where = names[r["name"]] if r["name"] >= 0 else f"shared memory of block {-1 - r['name']}"
            text.append(f"{where}, byte {r['offset']}:")
            for thread, wrote, pc in zip(r["threads"], r["wrote"], r["pc"]):
                block, t = divmod(int(thread), launch.BLOCK)
                who = f"block {block}, thread {t}" if block < self.grid else "a tensor copy"
                text.append(f"  {who} {'writes' if wrote else 'reads'} {self._line(int(pc)) if pc else ''}")
        raise Race("\n".join(text))

    def _line(self, pc: int) -> str:
        """Functions, innermost first, and the text of the line of the innermost one."""
        command = ["addr2line", "-i", "-f", "-C", "-e", self.library._name, hex(pc - 1)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        functions = [x.split("(")[0].replace("mpk::", "") for x in lines[::2]]
        file, _, number = lines[1].split(" ")[0].rpartition(":")
        source = Path(file).read_text().splitlines()[int(number) - 1].strip() if number.isdigit() else "?"
        return f"in {' < '.join(functions)}: {source}"
