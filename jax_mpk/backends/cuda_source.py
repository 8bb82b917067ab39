"""The CUDA source of a program: the kernel shell of `cuda/`, the task variants that this program needs, one kernel.

Operators with the same text are one variant, so a 36-layer model has as much code as a 2-layer one: what differs
between them (operand addresses) comes from slot tables at run time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cuda_code import DTYPES, WARPS, Emitter, rounds_only
from jax_mpk.backends.cuda_space import Scratch, Space, Span
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
ROOM = 66 << 10
"""Most bytes of activations, and of accumulators, in shared memory; beyond it they go to the workspace."""
PARTS = 128
"""Attention is split over about this many blocks, whatever the device: the split decides the order of sums."""
ROLE, PARAM, KIND = (lambda m, e=e: abi.enum(e, m) for e in ("Role", "Param", "Kind"))


@dataclass
class Unit:
    """What the generator decides about one operator."""

    variant: int
    parts: int = 1
    tickets: int = 0
    partial: int = 0  # bytes in the workspace
    stream: bool = False


@dataclass
class Source:
    """The text, one `Unit` an operator, the bytes of workspace that every block needs for itself, the frames of
    the ring (0: no stream), and the bytes of shared memory of a block."""

    text: str
    units: list[Unit]
    spill: int
    ring: int
    smem: int


@dataclass
class _Need:
    act: int = 0
    acc: int = 0
    spill: int = 0


@dataclass
class _Builder:
    program: abi.Program
    streamed: set[int]
    bodies: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    need: _Need = field(default_factory=_Need)
    memo: dict[bytes, Unit] = field(default_factory=dict)


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
    b = _Builder(program, streamed)
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


def _unit(b: _Builder, n: int) -> Unit:
    op = b.program["Op"][n]
    key = op.copy()
    for f in ("slot", "name", "prologue", "variant", "access"):
        key[f] = 0
    # Equal records with codes at equal places are equal; the rest is found by equal text.
    memo = key.tobytes() + bytes([n in b.streamed]) + int(op["access"]).to_bytes(8, "little") + _aligned(b.program, op)
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


def _aligned(p: abi.Program, op: np.void) -> bytes:
    """Which slots of an operator start at a multiple of 16 bytes."""
    return (p["Slot"]["offset"][int(op["slot"]) : int(op["slot"]) + int(op["slots"])] % 16 == 0).tobytes()


def _codes(op: np.void, role: str) -> range:
    r = ROLE(role)
    return range(int(op["code"][r]), int(op["code"][r]) + int(op["codes"][r]))


class _Op:
    """Helpers that every kind needs: the tile of the operator, and functions of its variant struct."""

    def __init__(self, b: _Builder, op: np.void):
        self.b, self.op, self.p, self.n = b, op, b.program, int(op["n_axes"])
        self.extent = [int(x) for x in op["extent"][: self.n]]
        self.tile = [max(1, min(int(t), e)) for t, e in zip(op["tile"][: self.n], self.extent, strict=True)]
        self.space = Space(self.extent, self.tile)
        self.lines: list[str] = []

    def param(self, name: str) -> int:
        return int(self.op["params"][PARAM(name)])

    def access(self, number: int) -> np.void:
        return self.p["Access"][int(self.op["access"]) + number]

    @property
    def tasks(self) -> int:
        return math.prod(-(-e // t) for e, t in zip(self.extent, self.tile, strict=True))

    def range(self) -> str:
        """`range(index)`: the bounds of every axis that is cut."""
        out = [f"struct Range {{ int lo[{max(self.n, 1)}], hi[{max(self.n, 1)}]; }};",
               "static __device__ __forceinline__ Range range(u32 index) {", "  Range r;"]  # fmt: skip
        for a in reversed(range(self.n)):
            e, t = self.extent[a], self.tile[a]
            parts = -(-e // t)
            if parts == 1:
                out.append(f"  r.lo[{a}] = 0; r.hi[{a}] = {e};")
            else:
                out.append(
                    f"  r.lo[{a}] = (int)(index % {parts}u) * {t}; r.hi[{a}] = min(r.lo[{a}] + {t}, {e}); index /= {parts}u;"
                )
        return "\n  ".join([*out, "  return r;", "}"])

    def product(self, axes: range) -> str:
        return " * ".join(self.space.count(a) for a in axes) or "1"

    def points(self, axes: range) -> tuple[str, Space]:
        """`batches()` and `at_batch()`: the points of `axes` in the tile, one at a time; and the space of one point."""
        lines = [f"static __device__ __forceinline__ int batches(const Range& r) {{ return {self.product(axes)}; }}",
                 "static __device__ __forceinline__ Range at_batch(Range r, int i) {"]  # fmt: skip
        tile = list(self.tile)
        for a in reversed(axes):
            if self.tile[a] > 1:
                tile[a] = 1
                c = self.space.count(a)
                lines.append(f"  r.lo[{a}] += i % {c}; r.hi[{a}] = r.lo[{a}] + 1; i /= {c};")
        return "\n  ".join([*lines, "  return r;", "}"]), Space(self.extent, tile)

    def function(self, name: str, arguments: str, codes: Iterable[int], scratch: dict[int, Scratch], space: Space | None = None,
                 spans: tuple[Span, ...] = ()) -> str:  # fmt: skip
        even = frozenset(n for n, x in enumerate(_aligned(self.p, self.op)) if x)
        e = Emitter(self.p, space or self.space, self.n, even)
        for n in codes:
            e.code(n, scratch, spans)
        head = f"static __device__ __forceinline__ void {name}(Worker& w, const Desc& d, const Range& r{arguments}) {{"
        return "\n  ".join([head, *e.out.text, "}"])

    def offset(self, x: np.void, axes: range, space: Space) -> str:
        terms = [
            f"(i64){space.lo(a)} * {int(x['stride'][a])}" for a in axes if int(x["stride"][a]) and space.lo(a) != "0"
        ]
        return " + ".join([*terms, str(int(x["offset"]))])

    def body(self, call: str, *parts: str, **constants: object) -> str:
        consts = [
            f"static constexpr {'bool' if isinstance(v, bool) else 'int'} {k} = {str(v).lower()};"
            for k, v in constants.items()
        ]
        inner = "\n".join([*consts, *parts]).replace("\n", "\n  ")
        return f"// call: {call}\nstruct @ {{\n  {inner}\n}};\n"

    def place(self, name: str, which: str, nbytes: int, at: int, spill: int) -> str:
        """A function that gives scratch `name`: `nbytes` from byte `at` of shared memory `which`, or of the spill."""
        where = f"w.spill + {spill}" if spill >= 0 else f"w.{which} + {at}"
        return f"static __device__ __forceinline__ u8* {name}(Worker& w) {{ return {where}; }}"


def _nop(b: _Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    return "", Unit(0)


def _rows(b: _Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = _Op(b, op)
    main = o.function("main", "", _codes(op, "MAIN"), {})
    run = "static __device__ __forceinline__ void run(Worker& w, const Desc& d) {\n  main(w, d, range(d.index));\n  finish(w, d, true);\n}"
    return o.body("@::run(w, d)", o.range(), main, run), Unit(0)


def _contract(b: _Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = _Op(b, op)
    nb, nm, nn, nk = (o.param(x) for x in ("N_BATCH", "N_M", "N_N", "N_K"))
    batch, m, n, k = (
        range(s, s + c) for s, c in zip(np.cumsum([0, nb, nm, nn]).tolist(), (nb, nm, nn, nk), strict=True)
    )
    M, N, K = math.prod(o.tile[a] for a in m), math.prod(o.tile[a] for a in n), math.prod(o.extent[a] for a in k)
    rhs = [o.access(o.param(f"RHS{j}")) for j in range(o.param("N_RHS"))]
    steps = [(_step(x, n, o.extent), _step(x, k, o.extent)) for x in rhs]
    integer = DTYPES[o.param("REDUCE_DTYPE")] != "F32"
    streamed = streamed and not integer and _streams(o, rhs, steps, M)
    points, space = o.points(batch)
    # Where things live. An activation that is too long for shared memory comes in chunks of KC, once for every 64 columns.
    KC = _chunk(o, k, M, K) if streamed else K
    lda = -(-KC // 128) * 128 + 8 if streamed else K
    together = streamed and len(rhs) * M <= 16
    act, red = (
        M * lda * (2 if streamed else 4),
        (4 * M * (len(rhs) if together else 1) if streamed else 8 * min(M, 4)) * 64 * 4,
    )
    acc = len(rhs) * M * N * 4
    spill = 0
    if act > ROOM:
        act_at, spill = spill, spill + -(-act // 128) * 128
    else:
        act_at, b.need.act = -1, max(b.need.act, act)
    if red + acc > ROOM * 2 - 16384:
        acc_at, spill = spill, spill + -(-acc // 128) * 128
    else:
        acc_at = -1
    b.need.acc = max(b.need.acc, red + (acc if acc_at < 0 else 0))
    b.need.spill = max(b.need.spill, spill)
    type_ = "int" if integer else "float"
    kind = "BF16" if streamed else ""
    chunks = (Span((k[-1],), "k0", f"k0 + {KC}", KC),) if KC < K else ()
    act_scratch = Scratch("act_", kind, K, (*batch, *m), lda, col0="k0" if chunks else "0", shared=act_at < 0)
    lhs = o.function("lhs", ", int k0", _codes(op, "LHS"), {abi.SLOT_ACT: act_scratch}, space, chunks)
    lhs = lhs.replace("{\n", "{\n    u8* act_ = act(w);\n", 1)
    accs = {abi.SLOT_ACC + j: Scratch(f"(acc(w) + {j * M * N * 4})") for j in range(len(rhs))}
    epilogue = o.function("epilogue", "", _codes(op, "EPILOGUE"), accs, space)
    flat = "0"
    for a in (*batch, *m):
        flat = f"({flat}) * {o.extent[a]} + {space.lo(a)}" if flat != "0" else space.lo(a)
    pick = lambda f, what: f"static __device__ __forceinline__ {f} {{ return {what}; }}"  # noqa: E731
    choose = lambda values: " : ".join([*(f"j == {j} ? {v}" for j, v in enumerate(values[:-1])), str(values[-1])])  # noqa: E731
    dtype = DTYPES[int(rhs[0]["dtype"])]
    parts = [f"using Sum = {type_};", o.range(), points,
             pick("int tile(const Range& r)", flat),
             pick("int rows(const Range& r)", o.product(m)), pick("int columns(const Range& r)", o.product(n)),
             o.place("act", "act", act, 0, act_at), o.place("red", "acc", red, 0, -1),
             o.place("acc", "acc", acc, red, acc_at)]  # fmt: skip
    if not streamed:
        number = "(int)x" if integer else "f(x)" if dtype in ("F32", "BF16", "F16") else "(float)(int)x"
        parts += [pick("const void* rhs(const Desc& d, int j)", choose([f"d.ptr[{int(x['slot'])}]" for x in rhs])),
                  pick("i64 rhs_offset(const Range& r, int j)", choose([f"({o.offset(x, range(0, k.start), space)})" for x in rhs])),
                  pick("i64 rhs_n(int j)", choose([s[0] for s in steps])), pick("i64 rhs_k(int j)", choose([s[1] for s in steps])),
                  pick("u32 load_rhs(const void* p, i64 i)", f"load<{dtype}>(p, i)"), pick("Sum number(u32 x)", number)]  # fmt: skip
    parts += [lhs, epilogue]
    call = "contract_stream<@>(w, d)" if streamed else "contract_direct<@>(w, d)"
    body = o.body(call, *parts, N_RHS=len(rhs), M=M, N=N, K=K, KC=KC, LDA=lda, LAYOUT=int(streamed), TOGETHER=together,
                  COLUMNS_INNER=bool(steps[0][0] == 1))  # fmt: skip
    return body, Unit(0, stream=streamed)


def _chunk(o: _Op, k: range, M: int, K: int) -> int:
    """How much of a streamed contraction's K the activation in shared memory holds: all, or equal chunks of whole
    frames where the prologue can be cut. K where neither fits: then the activation goes to the workspace."""
    fits = lambda n: M * (-(-n // 128) * 128 + 8) * 2 <= ROOM  # noqa: E731
    last = [a for a in k if o.extent[a] > 1] == [k[-1]]
    if fits(K) or not last or _reduces(o.p, _codes(o.op, "LHS")):
        return K
    return next((n for n in range(K - K % 128, 0, -128) if K % n == 0 and fits(n)), K)


def _step(x: np.void, axes: range, extent: list[int]) -> int:
    """The stride of the flattened index over `axes`."""
    real = [a for a in axes if extent[a] > 1]
    return int(x["stride"][real[-1]]) if real else 0


def _streams(o: _Op, rhs: list[np.void], steps: list[tuple[int, int]], rows: int) -> bool:
    """Whether the tensor core path fits: bf16 weights, and an activation that bf16 holds exactly."""
    if rows > 64 or any(DTYPES[int(x["dtype"])] != "BF16" for x in rhs):
        return False
    if len({s[0] == 1 for s in steps}) != 1:
        return False
    return _exact_bf16(o.p, _codes(o.op, "LHS"))


def _exact_bf16(p: abi.Program, codes: range) -> bool:
    """Whether everything that these codes store has just been rounded to bf16, or loaded from it."""
    ops = abi.ENUMS["Opcode"]
    for n in codes:
        c, exact = p["Code"][n], {}
        for s in p["Stage"][int(c["stage"]) : int(c["stage"]) + int(c["stages"])]:
            for i in p["Instr"][int(s["first"]) : int(s["first"]) + int(s["count"])]:
                op = ops[int(i["op"])]
                if op == "STORE":
                    if not exact.get(int(i["a"]), False):
                        return False
                elif op == "LOAD":
                    dtype = DTYPES[int(p["Access"][int(c["access"]) + int(i["aux"])]["dtype"])]
                    exact[int(i["dst"])] = dtype in ("BF16", "I8", "U8", "BOOL")
                elif op == "MOVE":
                    exact[int(i["dst"])] = exact.get(int(i["a"]), False)
                elif op == "SELECT":
                    exact[int(i["dst"])] = exact.get(int(i["b"]), False) and exact.get(int(i["c"]), False)
                elif op == "CONST":
                    exact[int(i["dst"])] = int(i["imm"]) & 0xFFFF == 0
                else:
                    exact[int(i["dst"])] = op in ("F_ROUND_BF16",)
            if int(s["kind"]) == 1:
                exact[int(s["dst"])] = False
    return True


def _attention(b: _Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = _Op(b, op)
    nb, nr = o.param("N_BATCH"), o.param("N_ROWS")
    batch, rows, column, key, head = range(nb), range(nb, nb + nr), nb + nr, nb + nr + 1, nb + nr + 2
    R, DV, KEYS, HEAD = math.prod(o.tile[a] for a in rows), o.extent[column], o.extent[key], o.extent[head]
    kx, vx = o.access(o.param("KEY")), o.access(o.param("VALUE"))
    exact = not rounds_only(b.program, _codes(op, "PROB"), lambda _: True)
    appends = [n for j in range(4) for n in _codes(op, f"APPEND{j}")]
    adds = _has(b.program, appends, "STORE_ADD")
    parts = 1 if exact or adds else max(1, min(PARTS // o.tasks, KEYS // 32, 32))
    rows_k, rows_v = _rows16(o, kx, head), _rows16(o, vx, column)
    fast_k, fast_v = (r and n in (8, 16, 32, 64, 128, 256) for r, n in ((rows_k, HEAD), (rows_v, DV)))
    single = not _reduces(b.program, [*_codes(op, "SCORE"), *_codes(op, "LIMIT")])
    flash = rows_k and rows_v and HEAD == DV <= 256 and HEAD % 32 == 0 and single and not exact
    RC = min(R, 8 if flash else 4)
    kc = min(512, -(-(-(-KEYS // parts)) // 32) * 32)
    split = 1 if DV <= 64 else 2 if DV <= 128 else 4
    places = min(WARPS // split, max(2, 1 << (4096 // (RC * DV)).bit_length() - 1))  # at most 16 KB of sums
    if flash:
        need = (RC * (HEAD + DV) + 2 * WARPS // split * 8 + 8 + max(places * RC * DV, HEAD * 8)) * 4
    else:
        need = RC * (HEAD + kc + DV + 4 + 8 * DV) * 4
    if need > ROOM * 2:
        place, b.need.spill = "w.spill", max(b.need.spill, need)
    else:
        place, b.need.act = "w.act", max(b.need.act, need)
    limit = len(_codes(op, "LIMIT")) > 0
    more = ", int row0, int row1, int key0, int key1, float* buffer_"
    row_span, key_span = Span(tuple(rows), "row0", "row1"), Span((key,), "key0", "key1")
    scores = {abi.SLOT_ACC: Scratch("buffer_", "F32", KEYS, tuple(rows), kc, "row0", "key0")}
    queries = {abi.SLOT_ACT: Scratch("buffer_", "F32", HEAD, tuple(rows), HEAD, "row0")}
    of_row, chunk = ", int row0, int row1, float* buffer_", (row_span,)
    functions = [o.function("epilogue", of_row, _codes(op, "EPILOGUE"),
                            {abi.SLOT_ACC + 1: Scratch("buffer_", "F32", DV, tuple(rows), DV, "row0")}, None, chunk)]  # fmt: skip
    if flash:
        functions += _flash(o, rows, key, appends, queries, row_span)
    else:
        functions += [
            o.function("query", of_row, _codes(op, "Q"), queries, None, chunk),
            o.function("score", more, _codes(op, "SCORE"), scores, None, (row_span, key_span)),
            o.function("prob", more, _codes(op, "PROB") if exact else range(0), scores, None, (row_span, key_span)),
            o.function("limit", "", _codes(op, "LIMIT"), {abi.SLOT_LIMIT: Scratch("(&w.sh->limit)")}),
            o.function("append", "", appends, {}),
        ]
    pick = lambda f, what: f"static __device__ __forceinline__ {f} {{ return {what}; }}"  # noqa: E731
    kt, vt = DTYPES[int(kx["dtype"])], DTYPES[int(vx["dtype"])]
    functions += [
        pick("int rows(const Range& r)", o.product(rows)), pick("u8* scratch(Worker& w)", place),
        pick("const void* keys(const Desc& d)", f"d.ptr[{int(kx['slot'])}]"),
        pick("const void* values(const Desc& d)", f"d.ptr[{int(vx['slot'])}]"),
        pick("i64 key_offset(const Range& r)", o.offset(kx, batch, o.space)),
        pick("i64 value_offset(const Range& r)", o.offset(vx, batch, o.space)),
        pick("u32 load_key(const void* p, i64 i)", f"load<{kt}>(p, i)"),
        pick("u32 load_value(const void* p, i64 i)", f"load<{vt}>(p, i)"),
    ]  # fmt: skip
    tickets = o.tasks if parts > 1 else 0
    body = o.body(f"{'flash' if flash else 'attention'}<@>(w, d)", o.range(), *functions, R=R, RC=RC, HEAD=HEAD, DV=DV, KEYS=KEYS, KC=kc, PARTS=parts,
                  SPLIT=split, PLACES=places, EXACT=int(exact), HAS_LIMIT=limit, FAST_K=fast_k, FAST_V=fast_v,
                  KEY_STRIDE=int(kx["stride"][key]), KEY_HEAD=int(kx["stride"][head]),
                  VALUE_STRIDE=int(vx["stride"][key]), VALUE_COLUMN=int(vx["stride"][column]))  # fmt: skip
    return body, Unit(0, parts, tickets, o.tasks * parts * R * (DV + 2) * 4 if parts > 1 else 0)


def _flash(o: _Op, rows: range, key: int, appends: list[int], queries: dict[int, Scratch], row_span: Span) -> list[str]:
    """What `flash` of cuda/tasks/flash.cuh has instead of the functions of `attention`."""
    e = Emitter(o.p, o.space, o.n)
    for n in _codes(o.op, "LIMIT"):
        e.everyone(n, {abi.SLOT_LIMIT: Scratch("(&limit_)")})
    head = "static __device__ __forceinline__ int limit_of(Worker& w, const Desc& d, const Range& r) {"
    limit = "\n  ".join([head, f"  int limit_ = {o.extent[key]};", *e.out.text, "  return limit_;", "}"])
    e, at, below = Emitter(o.p, o.space, o.n), {key: "key"}, 1
    for a in reversed(rows):
        size = o.space.most(a)
        at[a] = f"({o.space.lo(a)} + row{f' / {below}' if below > 1 else ''}{f' % {size}' if a != rows[0] else ''})"
        below *= size
    for n in _codes(o.op, "SCORE"):
        e.point(n, at, abi.SLOT_ACC, "x")
    head = (
        "static __device__ __forceinline__ void score_at(const Desc& d, const Range& r, int row, int key, float& x) {"
    )
    score = "\n  ".join([head, *e.out.text, "}"])
    # APPEND and Q start at different warps: their loads are on the way together.
    e = Emitter(o.p, o.space, o.n, frozenset(n for n, x in enumerate(_aligned(o.p, o.op)) if x))
    e.turn = 0
    e.out("if (row0 == 0) {")
    for n in appends:
        e.code(n, {})
    e.out("}")
    if _slots(o.p, appends, "STORE") & _slots(o.p, _codes(o.op, "Q"), "LOAD"):
        e.out("sync_consumers();")
    for n in _codes(o.op, "Q"):
        e.code(n, queries, (row_span,))
    head = ("static __device__ __forceinline__ void start(Worker& w, const Desc& d, const Range& r, int row0, int row1, "
            "float* buffer_) {")  # fmt: skip
    return [limit, score, "\n  ".join([head, *e.out.text, "}"])]


def _instrs(p: abi.Program, codes: Iterable[int]) -> Iterator[tuple[np.void, np.void]]:
    """Every instruction with its code."""
    for n in codes:
        c = p["Code"][n]
        for s in p["Stage"][int(c["stage"]) : int(c["stage"]) + int(c["stages"])]:
            for i in p["Instr"][int(s["first"]) : int(s["first"]) + int(s["count"])]:
                yield c, i


def _slots(p: abi.Program, codes: Iterable[int], prefix: str) -> set[int]:
    """The slots that instructions of this kind touch."""
    ops = abi.ENUMS["Opcode"]
    return {int(p["Access"][int(c["access"]) + int(i["aux"])]["slot"]) for c, i in _instrs(p, codes)
            if ops[int(i["op"])].startswith(prefix)}  # fmt: skip


def _has(p: abi.Program, codes: Iterable[int], op: str) -> bool:
    number = abi.enum("Opcode", op)
    return any(int(i["op"]) == number for _, i in _instrs(p, codes))


def _reduces(p: abi.Program, codes: Iterable[int]) -> bool:
    """Whether one of these codes has a reduction."""
    stages = ((int(p["Code"][n]["stage"]), int(p["Code"][n]["stages"])) for n in codes)
    return any((p["Stage"]["kind"][s : s + count] == abi.enum("StageKind", "REDUCE")).any() for s, count in stages)


def _rows16(o: _Op, x: np.void, inner: int) -> bool:
    """Whether rows along axis `inner` can be read as 16-byte pieces of bf16."""
    others = [int(s) for a, s in enumerate(x["stride"]) if a != inner]
    slot = o.p["Slot"][int(o.op["slot"]) + int(x["slot"])]
    return (DTYPES[int(x["dtype"])] == "BF16" and int(x["stride"][inner]) == 1 and o.extent[inner] % 8 == 0
            and all(s % 8 == 0 for s in others) and int(x["offset"]) % 8 == 0 and int(slot["offset"]) % 16 == 0)  # fmt: skip


def _sort(b: _Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = _Op(b, op)
    last = o.n - 1
    N, COUNT = o.extent[last], o.param("COUNT")
    P = 1 << (N - 1).bit_length()
    points, space = o.points(range(last))
    need = (-(-N // 32) * 32 + 2 * P) * 4
    if need > ROOM:
        place, b.need.spill = "w.spill", max(b.need.spill, need)
    else:
        place, b.need.act = "w.act", max(b.need.act, need)
    x = o.access(o.param("OUT"))
    key = o.function("key", ", u32* buffer_", _codes(op, "KEY") if "KEY" in abi.ENUMS["Role"] else _codes(op, "MAIN"),
                     {abi.SLOT_ACC: Scratch("buffer_")}, space)  # fmt: skip
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
    KIND("CONTRACT"): _contract,
    KIND("ATTENTION"): _attention,
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
