"""Attention on a GPU: on tensor cores (`cuda/kinds/flash.cuh`) and without them (`cuda/kinds/attention.cuh`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from jax_mpk import abi
from jax_mpk.abi.launch import WARPS
from jax_mpk.backends.cuda.space import Scratch, Span
from jax_mpk.backends.cuda.struct import Struct
from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Body, Nest
from jax_mpk.ir.graph import itemsize
from jax_mpk.ir.place import Place
from jax_mpk.kinds.bound import Bound
from jax_mpk.kinds.variant import ROOM, Variant

PARTS = 128
"""Attention is split over about this many blocks, whatever the device: the split decides the order of sums."""
ROUNDS = ("round_bf16", "round_f16")


@dataclass(frozen=True)
class Attending(Variant):
    """flash: on tensor cores. exact: probabilities are transformed, so keys are looked at three times and not once.
    rows: query rows at a time. keys: scores in scratch at a time. split: warps of a row's columns; places: sums of rows
    in scratch. wide_k, wide_v: rows of keys and values are read 16 bytes at a time. spills: scratch is in the spill."""

    flash: bool = False
    exact: bool = False
    rows: int = 0
    keys: int = 0
    split: int = 0
    places: int = 0
    wide_k: bool = False
    wide_v: bool = False
    spills: bool = False


def variant(b: Bound, body: Body, device: Device, fixed: Collection[int]) -> Attending:
    tile = {x.axis: max(1, min(t, x.extent)) for x, t in zip(b.axes, b.tile, strict=True)}
    rows = math.prod(tile[a] for a in b.roles("rows"))
    (column,), (key,), (head,) = (b.roles(r) for r in ("column", "key", "head"))
    dv, keys, dk = b.extent[column], b.extent[key], b.extent[head]
    tasks = math.prod(-(-b.extent[a] // t) for a, t in tile.items())
    nests = body.nests
    exact = not all(_rounds_only(x) for x in nests.get("PROB", ()))
    adds = any(x.store.mode != "set" for x in _appends(body))
    parts = 1 if exact or adds else max(1, min(PARTS // tasks, keys // 32, 32))
    rows_k, rows_v = _wide(b, body.cores["KEY"], head), _wide(b, body.cores["VALUE"], column)
    single = not _reduces([*nests.get("SCORE", ()), *nests.get("LIMIT", ())])
    flash = rows_k and rows_v and dk == dv <= 256 and dk % 32 == 0 and single and not exact
    pass_ = min(rows, 8 if flash else 4)
    chunk = min(512, -(-(-(-keys // parts)) // 32) * 32)
    split = 1 if dv <= 64 else 2 if dv <= 128 else 4
    places = min(WARPS // split, max(2, 1 << (4096 // (pass_ * dv)).bit_length() - 1))  # at most 16 KB of sums
    if flash:
        need = (pass_ * (dk + dv) + 2 * WARPS // split * 8 + 8 + max(places * pass_ * dv, dk * 8)) * 4
    else:
        need = pass_ * (dk + chunk + dv + 4 + 8 * dv) * 4
    spills = need > ROOM * 2
    wide = [r and n in (8, 16, 32, 64, 128, 256) for r, n in ((rows_k, dk), (rows_v, dv))]
    return Attending(parts=parts, act=0 if spills else need, spill=need if spills else 0,
                     partial=parts * rows * (dv + 2) * 4 if parts > 1 else 0, flash=flash, exact=exact, rows=pass_, keys=chunk,
                     split=split, places=places, wide_k=wide[0], wide_v=wide[1], spills=spills)  # fmt: skip


def source(s: Struct, v: Attending) -> tuple[str, str]:
    """The call of a task, and its struct."""
    batch, rows = s.axes("batch"), s.axes("rows")
    (column,), (key,), (head,) = (s.axes(r) for r in ("column", "key", "head"))
    nests, R = s.body.nests, math.prod(s.tile[a] for a in rows)
    DV, KEYS, HEAD = s.extent[column], s.extent[key], s.extent[head]
    k, value = s.body.cores["KEY"], s.body.cores["VALUE"]
    row_span, key_span = Span(tuple(rows), "row0", "row1"), Span((key,), "key0", "key1")
    scores = {abi.SLOT_ACC: Scratch("buffer_", "F32", KEYS, tuple(rows), v.keys, "row0", "key0")}
    queries = {abi.SLOT_ACT: Scratch("buffer_", "F32", HEAD, tuple(rows), HEAD, "row0")}
    sums = {abi.SLOT_ACC + 1: Scratch("buffer_", "F32", DV, tuple(rows), DV, "row0")}
    of_rows = ", int row0, int row1, float* buffer_"
    of_keys = ", int row0, int row1, int key0, int key1, float* buffer_"
    functions = [s.function("epilogue", of_rows, nests["EPILOGUE"], sums, None, (row_span,))]
    if v.flash:
        functions += _flash(s, rows, key, queries, row_span)
    else:
        functions += [
            s.function("query", of_rows, nests["Q"], queries, None, (row_span,)),
            s.function("score", of_keys, nests.get("SCORE", ()), scores, None, (row_span, key_span)),
            s.function("prob", of_keys, nests["PROB"] if v.exact else (), scores, None, (row_span, key_span)),
            s.function("limit", "", nests.get("LIMIT", ()), {abi.SLOT_LIMIT: Scratch("(&w.sh->limit)")}),
            s.function("append", "", _appends(s.body), {}),
        ]
    functions += [
        s.pick("int rows(const Range& r)", s.product(rows)), s.pick("u8* scratch(Worker& w)", "w.spill" if v.spills else "w.act"),
        s.pick("const void* keys(const Desc& d)", f"d.ptr[{k.slot}]"),
        s.pick("const void* values(const Desc& d)", f"d.ptr[{value.slot}]"),
        s.pick("i64 key_offset(const Range& r)", s.offset(k, batch)),
        s.pick("i64 value_offset(const Range& r)", s.offset(value, batch)),
        s.pick("u32 load_key(const void* p, i64 i)", f"load<{k.dtype.upper()}>(p, i)"),
        s.pick("u32 load_value(const void* p, i64 i)", f"load<{value.dtype.upper()}>(p, i)"),
    ]  # fmt: skip
    text = s.text(s.range(), *functions, R=R, RC=v.rows, HEAD=HEAD, DV=DV, KEYS=KEYS, KC=v.keys, PARTS=v.parts,
                  SPLIT=v.split, PLACES=v.places, EXACT=int(v.exact), HAS_LIMIT="LIMIT" in nests, FAST_K=v.wide_k,
                  FAST_V=v.wide_v, KEY_STRIDE=s.stride(k, key), KEY_HEAD=s.stride(k, head),
                  VALUE_STRIDE=s.stride(value, key), VALUE_COLUMN=s.stride(value, column))  # fmt: skip
    return f"{'flash' if v.flash else 'attention'}<@>(w, d)", text


def _flash(s: Struct, rows: list[int], key: int, queries: dict[int, Scratch], row_span: Span) -> list[str]:
    """What `flash` of cuda/kinds/flash.cuh has instead of the functions of `attention`."""
    nests = s.body.nests
    w = s.writer()
    w.out(f"int limit_ = {s.extent[key]};")
    for x in nests.get("LIMIT", ()):
        w.everyone(x, {abi.SLOT_LIMIT: Scratch("(&limit_)")})
    w.out("return limit_;")
    limit = s.wrap("int limit_of(Worker& w, const Desc& d, const Range& r)", w)
    w, at, below = s.writer(), {key: "key"}, 1
    for a in reversed(rows):
        size = s.space.most(a)
        at[a] = f"({s.space.lo(a)} + row{f' / {below}' if below > 1 else ''}{f' % {size}' if a != rows[0] else ''})"
        below *= size
    for x in nests.get("SCORE", ()):
        w.point(x, at, abi.SLOT_ACC, "x")
    score = s.wrap("void score_at(const Desc& d, const Range& r, int row, int key, float& x)", w)
    # The appends and Q start at different warps: their loads are on the way together.
    w = s.writer()
    w.turn = 0
    w.out("if (row0 == 0) {")
    for x in _appends(s.body):
        w.nest(x, {})
    w.out("}")
    stored = {x.store.place.slot for x in _appends(s.body)}
    if stored & {x.place(y).slot for x in nests["Q"] for y in x.walk() if isinstance(y, E.Load)}:
        w.out("sync_consumers();")
    for x in nests["Q"]:
        w.nest(x, queries, (row_span,))
    start = s.wrap("void start(Worker& w, const Desc& d, const Range& r, int row0, int row1, float* buffer_)", w)
    return [limit, score, start]


def _appends(body: Body) -> list[Nest]:
    return [x for role, nests in body.nests.items() if role.startswith("APPEND") for x in nests]


def _reduces(nests: Iterable[Nest]) -> bool:
    return any(isinstance(x, E.Reduce) for nest in nests for x in nest.walk())


def _rounds_only(nest: Nest) -> bool:
    """Whether a nest does no more than round."""
    return all(isinstance(x, E.Acc) or (isinstance(x, E.Unary) and x.op in ROUNDS) for x in nest.walk())


def _wide(b: Bound, p: Place, inner: int) -> bool:
    """Whether rows along axis `inner` can be read as 16-byte pieces of bf16."""
    others = [v for a, v in p.strides.items() if a != inner]
    return (p.dtype == "bf16" and p.strides.get(inner, 0) == 1 and b.extent[inner] % 8 == 0 and all(v % 8 == 0 for v in others)
            and p.offset % 8 == 0 and b.binder.base[p.slot] * itemsize(p.dtype) % 16 == 0)  # fmt: skip
