"""The CUDA source of a program: the kernel shell of `cuda/`, the task variants that this program needs, one kernel.

Operators with the same text are one variant, so a 36-layer model has as much code as a 2-layer one: what differs
between them (operand addresses) comes from slot tables at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jax_mpk import abi
from jax_mpk.backends.cuda.struct import Struct
from jax_mpk.device import Device
from jax_mpk.ir.graph import itemsize
from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.kinds import KINDS, kind_of
from jax_mpk.kinds.bound import Bound

RUNTIME = ("ptx", "base", "ops", "reduce", "launch", "shell", "stream")
"""Files of cuda/runtime/, in the order in which they need each other (but see `_shell`)."""


@dataclass(frozen=True)
class Source:
    """The text, and the number of the variant of every grid."""

    text: str
    variants: list[int]


def root() -> Path:
    """The directory of the kernel shell: beside this package when installed, at the top of a source tree."""
    package = Path(__file__).resolve().parents[2]
    return next((p for p in (package / "cuda", package.parent / "cuda") if (p / "runtime").is_dir()), package / "cuda")


def generate(tg: TaskGraph, device: Device, operands: int) -> Source:
    """The source of a task graph that has been placed on `device`; `operands`: arguments and results."""
    bodies: dict[str, int] = {}
    calls: list[str] = []
    known: dict[tuple[object, ...], int] = {}
    variants = []
    for n in range(len(tg.grids)):
        unit = tg.unit(n)
        aligned = _aligned(unit.bound) if unit is not None else frozenset()
        key = (unit.bound.key, unit.variant, aligned) if unit is not None else ()
        if key not in known:
            call, text = "finish(w, d, true)", ""
            if unit is not None:
                call, text = kind_of(unit.bound.op).source(Struct(unit.bound, unit.body, aligned), unit.variant)
            if text not in bodies:
                bodies[text] = len(bodies)
                calls.append(call.replace("@", f"V{bodies[text]}"))
            known[key] = bodies[text]
        variants.append(known[key])
    s = tg.shared
    defines = {"MPK_PROFILE": int(device.profile), "MPK_STREAM": int(s.ring > 0), "MPK_RING": max(s.ring, 1),
               "MPK_WINDOW": device.window, "MPK_BASES": operands + 2, "MPK_SLOTS": s.slots, "MPK_ACT_BYTES": s.act,
               "MPK_ACC_BYTES": s.acc, "MPK_SMEM_LIMIT": device.shared}  # fmt: skip
    lines = [*(f"#define {k} {v}" for k, v in defines.items()), _shell(), "namespace mpk {", ""]
    lines += [text.replace("@", f"V{n}") for text, n in bodies.items()]
    return Source("\n".join([*lines, _results(tg), _kernel(calls, s.ring > 0, s.spill, s.total), ""]), variants)


MANY = 48
"""Variants from which each is a function of its own: as one function, a scan written out took ptxas minutes. A program
with fewer (a decoder has some 12) has them inlined: a call saves registers, and one reload took 1.4 us of an epilogue."""

POISON = {
    "f32": "0x7fc00000u",
    "bf16": "0x7fc0u",
    "f16": "0x7e00u",
    "i32": "0x80000000u",
    "i16": "0x8000u",
    "i8": "0x80u",
}
"""What results hold after a launch that gave up: NaN, the smallest integer; of unsigned ones and booleans every bit."""


def _results(tg: TaskGraph) -> str:
    """The table of results, also of those that live in an operand."""
    results = [b for b in tg.buffers if b.space == "result"]
    rows = []
    for b in results:
        size = itemsize(b.dtype)
        last = 2 + len(results) - b.index  # behind the results are workspace and constants
        rows.append(f"{{{b.nbytes // size}ull, {last}, {size}, {POISON.get(b.dtype, f'{(1 << 8 * size) - 1:#x}u')}}}")
    return f"__device__ const Result RESULTS[] = {{{', '.join(rows)}}};"


def _aligned(b: Bound) -> frozenset[int]:
    """Which slots of an operator start at a multiple of 16 bytes."""
    bases = zip(b.binder.slots, b.binder.base, strict=True)
    return frozenset(n for n, (v, base) in enumerate(bases) if base * itemsize(b.graph.values[v].dtype) % 16 == 0)


def _shell() -> str:
    """The files of the shell as one text: the only headers that a program sees."""
    at = root()
    parts = [
        (at / f).read_text().replace("#pragma once", "")
        for f in (*(f"runtime/{n}.cuh" for n in RUNTIME), *(f for k in KINDS for f in k.files))
    ]
    # ptx.cuh needs the types of base.cuh, base.cuh nothing; the format comes between.
    ptx, base, *rest = parts
    event = next(p for p in (at / "event.h", at.parent / "ffi" / "event.h") if p.is_file()).read_text()
    return "\n".join(
        [
            base,
            abi.kernel_header(),
            "namespace mpk { using namespace abi; }",
            event.replace("#pragma once", ""),
            ptx,
            *rest,
        ]
    )


def _kernel(calls: list[str], stream: bool, spill: int, smem: int) -> str:
    cases = "\n".join(f"      case {n}: run_{n}(launch, d); break;" for n in range(len(calls)))
    inline = "__forceinline__" if len(calls) < MANY else "__noinline__"
    functions = "\n".join(
        f"""__device__ {inline} void run_{n}(const Launch& launch, const Desc& d) {{
  extern __shared__ __align__(1024) u8 smem[];
  Worker w(launch, smem, {spill});
  stamp(w, d, 0);
  {call};
}}"""
        for n, call in enumerate(calls)
    )
    init = (
        """
  if (threadIdx.x == 0) {
    for (int i = 0; i < MPK_RING; ++i) { mbarrier_init(&sh->full[i], 1); mbarrier_init(&sh->empty[i], WARPS); }
    mbarrier_fence_init();
  }"""
        if stream
        else ""
    )
    load = "if (warp == LOADER) { loader(s, sh, smem); return; }" if stream else "if (warp == LOADER) return;"
    return f"""
static_assert(SMEM_BYTES == {smem}, "passes/bodies.py and launch.cuh disagree");
{functions}
}}  // namespace mpk

extern "C" __global__ void __launch_bounds__(mpk::BLOCK, 1) mpk_program(const __grid_constant__ mpk::Launch launch) {{
  using namespace mpk;
  extern __shared__ __align__(1024) u8 smem[];
  State* s = launch.state;
  Shared* sh = (Shared*)(smem + SHARED_AT);
  const int warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {{
    sh->done = sh->frame = sh->phase = 0;
    sh->act_key = 0;
    sh->epoch = ld_relaxed(&s->epoch);
  }}{init}
  __syncthreads();
  {load}
  if (warp == CONTROLLER) {{ controller(launch, sh); return; }}
  if (warp == STORER) {{ storer(s, sh); return; }}

  for (u32 at = 0;; at = at + 1 < DEPTH ? at + 1 : 0) {{  // little is live across a task: it may need every register
    barrier_sync(READY + at, THREADS + 32);
    const Desc& d = sh->desc[at];
    switch (d.variant) {{
{cases}
    }}
    forget();  // read again, not kept: every register that lives across a task is one that no task has
    const bool quit = d.variant == QUIT;
    barrier_arrive(DONE + at, THREADS + 32);
    if (quit) break;
  }}
  if (threadIdx.x == 0) *(volatile u32*)&sh->done = 1;
  leave(launch, sh, RESULTS, sizeof RESULTS / sizeof *RESULTS);
}}
"""
