"""The variants of ATTENTION: those on tensor cores (`cuda/tasks/flash.cuh`) and the others (`cuda/tasks/attention.cuh`)."""

from __future__ import annotations

import math

import numpy as np

from jax_mpk import abi
from jax_mpk.backends import cuda_variant
from jax_mpk.backends.cuda_code import DTYPES, WARPS, Emitter, rounds_only
from jax_mpk.backends.cuda_space import Scratch, Span
from jax_mpk.backends.cuda_variant import Builder, Op, Unit, aligned, codes_of, has, reduces, slots_of

PARTS = 128
"""Attention is split over about this many blocks, whatever the device: the split decides the order of sums."""


def attention(b: Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = Op(b, op)
    nb, nr = o.param("N_BATCH"), o.param("N_ROWS")
    batch, rows, column, key, head = range(nb), range(nb, nb + nr), nb + nr, nb + nr + 1, nb + nr + 2
    R, DV, KEYS, HEAD = math.prod(o.tile[a] for a in rows), o.extent[column], o.extent[key], o.extent[head]
    kx, vx = o.access(o.param("KEY")), o.access(o.param("VALUE"))
    exact = not rounds_only(b.program, codes_of(op, "PROB"), lambda _: True)
    appends = [n for j in range(4) for n in codes_of(op, f"APPEND{j}")]
    adds = any(has(b.program, appends, op) for op in abi.COMBINES.values())
    parts = 1 if exact or adds else max(1, min(PARTS // o.tasks, KEYS // 32, 32))
    rows_k, rows_v = _rows16(o, kx, head), _rows16(o, vx, column)
    fast_k, fast_v = (r and n in (8, 16, 32, 64, 128, 256) for r, n in ((rows_k, HEAD), (rows_v, DV)))
    single = not reduces(b.program, [*codes_of(op, "SCORE"), *codes_of(op, "LIMIT")])
    flash = rows_k and rows_v and HEAD == DV <= 256 and HEAD % 32 == 0 and single and not exact
    RC = min(R, 8 if flash else 4)
    kc = min(512, -(-(-(-KEYS // parts)) // 32) * 32)
    split = 1 if DV <= 64 else 2 if DV <= 128 else 4
    places = min(WARPS // split, max(2, 1 << (4096 // (RC * DV)).bit_length() - 1))  # at most 16 KB of sums
    if flash:
        need = (RC * (HEAD + DV) + 2 * WARPS // split * 8 + 8 + max(places * RC * DV, HEAD * 8)) * 4
    else:
        need = RC * (HEAD + kc + DV + 4 + 8 * DV) * 4
    if need > cuda_variant.ROOM * 2:
        place, b.need.spill = "w.spill", max(b.need.spill, need)
    else:
        place, b.need.act = "w.act", max(b.need.act, need)
    limit = len(codes_of(op, "LIMIT")) > 0
    more = ", int row0, int row1, int key0, int key1, float* buffer_"
    row_span, key_span = Span(tuple(rows), "row0", "row1"), Span((key,), "key0", "key1")
    scores = {abi.SLOT_ACC: Scratch("buffer_", "F32", KEYS, tuple(rows), kc, "row0", "key0")}
    queries = {abi.SLOT_ACT: Scratch("buffer_", "F32", HEAD, tuple(rows), HEAD, "row0")}
    of_row, chunk = ", int row0, int row1, float* buffer_", (row_span,)
    functions = [o.function("epilogue", of_row, codes_of(op, "EPILOGUE"),
                            {abi.SLOT_ACC + 1: Scratch("buffer_", "F32", DV, tuple(rows), DV, "row0")}, None, chunk)]  # fmt: skip
    if flash:
        functions += _flash(o, rows, key, appends, queries, row_span)
    else:
        functions += [
            o.function("query", of_row, codes_of(op, "Q"), queries, None, chunk),
            o.function("score", more, codes_of(op, "SCORE"), scores, None, (row_span, key_span)),
            o.function("prob", more, codes_of(op, "PROB") if exact else range(0), scores, None, (row_span, key_span)),
            o.function("limit", "", codes_of(op, "LIMIT"), {abi.SLOT_LIMIT: Scratch("(&w.sh->limit)")}),
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


def _flash(o: Op, rows: range, key: int, appends: list[int], queries: dict[int, Scratch], row_span: Span) -> list[str]:
    """What `flash` of cuda/tasks/flash.cuh has instead of the functions of `attention`."""
    e = Emitter(o.p, o.space, o.n)
    for n in codes_of(o.op, "LIMIT"):
        e.everyone(n, {abi.SLOT_LIMIT: Scratch("(&limit_)")})
    head = "static __device__ __forceinline__ int limit_of(Worker& w, const Desc& d, const Range& r) {"
    limit = "\n  ".join([head, f"  int limit_ = {o.extent[key]};", *e.out.text, "  return limit_;", "}"])
    e, at, below = Emitter(o.p, o.space, o.n), {key: "key"}, 1
    for a in reversed(rows):
        size = o.space.most(a)
        at[a] = f"({o.space.lo(a)} + row{f' / {below}' if below > 1 else ''}{f' % {size}' if a != rows[0] else ''})"
        below *= size
    for n in codes_of(o.op, "SCORE"):
        e.point(n, at, abi.SLOT_ACC, "x")
    head = (
        "static __device__ __forceinline__ void score_at(const Desc& d, const Range& r, int row, int key, float& x) {"
    )
    score = "\n  ".join([head, *e.out.text, "}"])
    # APPEND and Q start at different warps: their loads are on the way together.
    e = Emitter(o.p, o.space, o.n, frozenset(n for n, x in enumerate(aligned(o.p, o.op)) if x))
    e.turn = 0
    e.out("if (row0 == 0) {")
    for n in appends:
        e.code(n, {})
    e.out("}")
    if slots_of(o.p, appends, "STORE") & slots_of(o.p, codes_of(o.op, "Q"), "LOAD"):
        e.out("sync_consumers();")
    for n in codes_of(o.op, "Q"):
        e.code(n, queries, (row_span,))
    head = ("static __device__ __forceinline__ void start(Worker& w, const Desc& d, const Range& r, int row0, int row1, "
            "float* buffer_) {")  # fmt: skip
    return [limit, score, "\n  ".join([head, *e.out.text, "}"])]


def _rows16(o: Op, x: np.void, inner: int) -> bool:
    """Whether rows along axis `inner` can be read as 16-byte pieces of bf16."""
    others = [int(s) for a, s in enumerate(x["stride"]) if a != inner]
    slot = o.p["Slot"][int(o.op["slot"]) + int(x["slot"])]
    return (DTYPES[int(x["dtype"])] == "BF16" and int(x["stride"][inner]) == 1 and o.extent[inner] % 8 == 0
            and all(s % 8 == 0 for s in others) and int(x["offset"]) % 8 == 0 and int(slot["offset"]) % 16 == 0)  # fmt: skip
