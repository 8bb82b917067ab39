"""The CUDA source of a program: the kernel shell of `cuda/`, the task variants that this program needs, one kernel.

Operators with the same text are one variant, so a 36-layer model has as much code as a 2-layer one: what differs
between them (operand addresses) comes from slot tables at run time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_mpk import abi
from jax_mpk.backends import cuda_variant
from jax_mpk.backends.cuda_attention import attention
from jax_mpk.backends.cuda_code import DTYPES
from jax_mpk.backends.cuda_contract import contract
from jax_mpk.backends.cuda_space import Scratch
from jax_mpk.backends.cuda_variant import KIND, Builder, Op, Unit, aligned, codes_of
from jax_mpk.options import WINDOW

SHELL = ("ptx.cuh", "base.cuh", "ops.cuh", "reduce.cuh", "shell.cuh", "stream.cuh")
TASKS = ("tasks/contract.cuh", "tasks/attention.cuh", "tasks/flash.cuh", "tasks/sort.cuh")
FRAME = 16384
SMEM = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_90a": 232448,
    "sm_100": 232448,
    "sm_100a": 232448,
}


@dataclass
class Source:
    """The text, one `Unit` an operator, the bytes of workspace that every block needs for itself, the frames of
    the ring (0: no stream), and the bytes of shared memory of a block."""

    text: str
    units: list[Unit]
    spill: int
    ring: int
    smem: int


def root() -> Path:
    """The directory of the kernel shell: beside this package when installed, at the top of a source tree."""
    package = Path(__file__).resolve().parents[1]
    return next(
        (p for p in (package / "cuda", package.parent / "cuda") if (p / "shell.cuh").is_file()), package / "cuda"
    )


def generate(program: abi.Program, arch: str, *, stream: bool = True, window: int = WINDOW, ring: int = 0,
             profile: bool = False) -> Source:  # fmt: skip
    """The source for `arch` ("sm_90a"). `stream` False keeps to instructions that sm_80 has; `ring` 0 = what fits;
    `profile`: every task leaves four times (`stamp` of shell.cuh) at the end of the workspace."""
    stream = stream and arch[:5] not in ("sm_80", "sm_86", "sm_87", "sm_89") and len(program["Stream"]) > 0
    tasks, streams = program["Task"], program["Stream"]
    streamed = set(np.unique(tasks["op"][streams["task"]]).tolist()) if stream else set()
    b = Builder(program, streamed)
    units = [_unit(b, n) for n in range(len(program["Op"]))]
    stream = any(u.stream for u in units)  # f32 weights have streams in the program, and no path here that takes them
    limit = SMEM.get(arch, 101376)
    act, acc = (-(-x // 128) * 128 for x in (b.need.act, b.need.acc))
    slots = max([1, *(int(x) for x in program["Op"]["slots"])])
    shared = 3 * (56 + 8 * slots) + 160  # struct Shared; a static_assert of the source compares
    depth = min(ring or 12, (limit - act - acc - shared) // (FRAME + 16))
    if stream and depth < window + 1:
        return generate(program, arch, stream=False, profile=profile)
    smem = act + acc + shared + (depth * (FRAME + 16) if stream else 0)
    bases = int(program.header["args"]) + int(program.header["results"]) + 2
    defines = {"MPK_PROFILE": int(profile), "MPK_STREAM": int(stream), "MPK_RING": max(depth, 1), "MPK_WINDOW": window, "MPK_BASES": bases,
               "MPK_SLOTS": slots, "MPK_ACT_BYTES": act, "MPK_ACC_BYTES": acc, "MPK_SMEM_LIMIT": limit}  # fmt: skip
    text = "\n".join(
        [*(f"#define {k} {v}" for k, v in defines.items()), _shell(), "namespace mpk {", ""]
        + [body.replace("@", f"V{n}") for body, n in b.bodies.items()]
        + [_kernel(b.names, stream, b.need.spill, smem), ""]
    )
    return Source(text, units, b.need.spill, depth if stream else 0, smem)


def _shell() -> str:
    """The files of the shell as one text: the only headers that a program sees."""
    at = root()
    # NVRTC has no offsetof: the host's compiler checks the offsets, this one the sizes.
    lines = abi.header().replace("#pragma once", "").splitlines()
    abi_h = "\n".join(x for x in lines if "offsetof" not in x)
    parts = [(at / f).read_text().replace("#pragma once", "") for f in (*SHELL, *TASKS)]
    # ptx.cuh needs the types of base.cuh, base.cuh nothing; the format comes between.
    ptx, base, *rest = parts
    event = next(p for p in (root() / "event.h", root().parent / "ffi" / "event.h") if p.is_file()).read_text()
    return "\n".join([base, abi_h, event.replace("#pragma once", ""), ptx, *rest])


def _unit(b: Builder, n: int) -> Unit:
    op = b.program["Op"][n]
    key = op.copy()
    for f in ("slot", "name", "prologue", "variant", "access"):
        key[f] = 0
    # Equal records with codes at equal places are equal; the rest is found by equal text.
    memo = key.tobytes() + bytes([n in b.streamed]) + int(op["access"]).to_bytes(8, "little") + aligned(b.program, op)
    if memo not in b.memo:
        body, unit = _EMIT[int(op["kind"])](b, op, n in b.streamed)
        if body not in b.bodies:
            b.bodies[body] = len(b.bodies)
            m = re.search(r"// call: (.*)", body)
            b.names.append(m.group(1).replace("@", f"V{b.bodies[body]}") if m else "finish(w, d, true)")
        unit.variant = b.bodies[body]
        b.memo[memo] = unit
    u = b.memo[memo]
    return Unit(u.variant, u.parts, u.tickets, u.partial, u.stream)


def _nop(b: Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    return "", Unit(0)


def _rows(b: Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = Op(b, op)
    main = o.function("main", "", codes_of(op, "MAIN"), {})
    run = "static __device__ __forceinline__ void run(Worker& w, const Desc& d) {\n  main(w, d, range(d.index));\n  finish(w, d, true);\n}"
    return o.body("@::run(w, d)", o.range(), main, run), Unit(0)


def _sort(b: Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = Op(b, op)
    last = o.n - 1
    N, COUNT = o.extent[last], o.param("COUNT")
    P = 1 << (N - 1).bit_length()
    points, space = o.points(range(last))
    need = (-(-N // 32) * 32 + 2 * P) * 4
    if need > cuda_variant.ROOM:
        place, b.need.spill = "w.spill", max(b.need.spill, need)
    else:
        place, b.need.act = "w.act", max(b.need.act, need)
    x = o.access(o.param("OUT"))
    key = o.function("key", ", u32* buffer_", codes_of(op, "MAIN"), {abi.SLOT_ACC: Scratch("buffer_")}, space)
    store = (f"static __device__ __forceinline__ void put(const Desc& d, const Range& r, int i, u32 x) {{ "
             f"store<{DTYPES[int(x['dtype'])]}>(d.ptr[{int(x['slot'])}], {o.offset(x, range(last), space)} + (i64)i * {int(x['stride'][last])}, x); }}")  # fmt: skip
    scratch = f"static __device__ __forceinline__ u8* scratch(Worker& w) {{ return {place}; }}"
    body = o.body("sort<@>(w, d)", o.range(), points, key, store, scratch, N=N, P=P, COUNT=COUNT,
                  DESCENDING=bool(o.param("DESCENDING")), POSITIONS=bool(o.param("PAYLOAD")),
                  FLOAT=DTYPES[o.param("KEY_DTYPE")] == "F32")  # fmt: skip
    return body, Unit(0)


_EMIT = {
    KIND("NOP"): _nop,
    KIND("ROWS"): _rows,
    KIND("CONTRACT"): contract,
    KIND("ATTENTION"): attention,
    KIND("SORT"): _sort,
}


def _kernel(calls: list[str], stream: bool, spill: int, smem: int) -> str:
    cases = "\n".join(f"      case {n}: run_{n}(launch, d); break;" for n in range(len(calls)))
    functions = "\n".join(
        f"""__device__ __forceinline__ void run_{n}(const Launch& launch, const Desc& d) {{
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
static_assert(SMEM_BYTES == {smem}, "cuda_source.py and shell.cuh disagree");
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
  leave(launch.state, sh);
}}
"""
