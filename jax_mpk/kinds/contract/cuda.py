"""Contractions on a GPU: where operands and activation live, what is streamed, the functions that cuda/ calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from jax_mpk import abi
from jax_mpk.backends.cuda.expressions import bits
from jax_mpk.backends.cuda.space import Scratch, Span
from jax_mpk.backends.cuda.struct import Struct
from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Body, Nest
from jax_mpk.ir.expr import Expr
from jax_mpk.ir.place import Place
from jax_mpk.kinds.bound import Bound
from jax_mpk.kinds.contract.stream import operands
from jax_mpk.kinds.variant import ROOM, Variant

STREAM_ROWS = 64
"""Most rows of an activation whose weights are streamed."""


@dataclass(frozen=True)
class Contraction(Variant):
    """chunk: how much of K the activation in shared memory holds at once. row: elements of a row of it. act_at, acc_at:
    bytes into the spill, -1: in shared memory. sums: bytes of accumulators before the epilogue's. together: the right
    sides are multiplied in one pass over the activation."""

    chunk: int = 0
    row: int = 0
    act_at: int = -1
    acc_at: int = -1
    sums: int = 0
    together: bool = False


def variant(b: Bound, body: Body, device: Device, fixed: Collection[int]) -> Contraction:
    tile = {x.axis: max(1, min(t, x.extent)) for x, t in zip(b.axes, b.tile, strict=True)}
    m, n = (math.prod(tile[a] for a in b.roles(r)) for r in ("m", "n"))
    k = math.prod(b.extent[a] for a in b.roles("k"))
    rhs = _rhs(body)
    streamed = device.tensor_copies and _streams(b, body, rhs, m) and operands(b, device, fixed) is not None
    chunk = _chunk(b, body, m, k) if streamed else k
    row = _row(chunk) if streamed else k
    together = streamed and len(rhs) * m <= 16
    act = m * row * (2 if streamed else 4)
    sums = (4 * m * (len(rhs) if together else 1) if streamed else 8 * min(m, 4)) * 64 * 4
    acc = len(rhs) * m * n * 4
    spill, act_at, acc_at = 0, -1, -1
    if act > ROOM:
        act_at, spill, act = spill, spill + -(-act // 128) * 128, 0
    if sums + acc > ROOM * 2 - 16384:
        acc_at, spill, acc = spill, spill + -(-acc // 128) * 128, 0
    return Contraction(streamed, act=act, acc=sums + acc, spill=spill, chunk=chunk, row=row, act_at=act_at, acc_at=acc_at,
                       sums=sums, together=together)  # fmt: skip


def source(s: Struct, v: Contraction) -> tuple[str, str]:
    """The call of a task, and its struct."""
    batch, m, n, k = (s.axes(r) for r in ("batch", "m", "n", "k"))
    M, N, K = math.prod(s.tile[a] for a in m), math.prod(s.tile[a] for a in n), math.prod(s.extent[a] for a in k)
    rhs, params = _rhs(s.body), s.body.params
    integer = params["REDUCE_DTYPE"] != abi.enum("Dtype", "F32")  # its sums wrap around
    points, space = s.points(batch)
    chunks = (Span((k[-1],), "k0", f"k0 + {v.chunk}", v.chunk),) if v.chunk < K else ()
    act = Scratch("act_", "BF16" if v.streamed else "", K, (*batch, *m), v.row, col0="k0" if chunks else "0",
                  shared=v.act_at < 0)  # fmt: skip
    lhs = s.function("lhs", ", int k0", s.body.nests["LHS"], {abi.SLOT_ACT: act}, space, chunks, "u8* act_ = act(w);")
    acc = {abi.SLOT_ACC + j: Scratch(f"(acc(w) + {j * M * N * 4})") for j in range(len(rhs))}
    flat = "0"
    for a in (*batch, *m):
        flat = f"({flat}) * {s.extent[a]} + {space.lo(a)}" if flat != "0" else space.lo(a)
    parts = [f"using Sum = {'u32' if integer else 'float'};", s.range(), points,
             s.pick("int tile(const Range& r)", flat),
             s.pick("int rows(const Range& r)", s.product(m)), s.pick("int columns(const Range& r)", s.product(n)),
             s.scratch("act", "act", 0, v.act_at), s.scratch("red", "acc", 0, -1),
             s.scratch("acc", "acc", v.sums, v.acc_at)]  # fmt: skip
    if not v.streamed:
        parts += [s.pick("const void* rhs(const Desc& d, int j)", _choose([f"d.ptr[{x.slot}]" for x in rhs])),
                  s.pick("i64 rhs_offset(const Range& r, int j)", _choose([f"({s.offset(x, (*batch, *n), space)})" for x in rhs])),
                  s.pick("i64 rhs_n(int j)", _choose([_step(s, x, n) for x in rhs])),
                  s.pick("i64 rhs_k(int j)", _choose([_step(s, x, k) for x in rhs])),
                  s.pick("u32 load_rhs(const void* p, i64 i, int j)", _choose([f"load<{x.dtype.upper()}>(p, i)" for x in rhs])),
                  s.pick("Sum number(u32 x)", "x" if integer else "f(x)")]  # fmt: skip
    parts += [lhs, s.function("epilogue", "", s.body.nests["EPILOGUE"], acc, space)]
    text = s.text(*parts, N_RHS=len(rhs), M=M, N=N, K=K, KC=v.chunk, LDA=v.row, LAYOUT=int(v.streamed),
                  TOGETHER=v.together, COLUMNS_INNER=_step(s, rhs[0], n) == 1)  # fmt: skip
    return f"contract_{'stream' if v.streamed else 'direct'}<@>(w, d)", text


def _choose(values: Sequence[object]) -> str:
    return " : ".join([*(f"j == {j} ? {v}" for j, v in enumerate(values[:-1])), str(values[-1])])


def _rhs(body: Body) -> list[Place]:
    return [body.cores[f"RHS{j}"] for j in range(body.params["N_RHS"])]


def _step(s: Struct, p: Place, axes: list[int]) -> int:
    """The stride of the flattened index over `axes`."""
    real = [a for a in axes if s.extent[a] > 1]
    return s.stride(p, real[-1]) if real else 0


def _row(k: int) -> int:
    """Elements of an activation's row in shared memory: whole frames, and 16 bytes so that rows start in other banks."""
    return -(-k // 128) * 128 + 8


def _chunk(b: Bound, body: Body, rows: int, k: int) -> int:
    """How much of a streamed contraction's K the activation in shared memory holds: all, or equal chunks of whole
    frames where the prologue can be cut. K where neither fits: then the activation goes to the workspace."""
    fits: Callable[[int], bool] = lambda n: rows * _row(n) * 2 <= ROOM
    axes = b.roles("k")
    last = [a for a in axes if b.extent[a] > 1] == axes[-1:]
    if fits(k) or not last or any(isinstance(x, E.Reduce) for nest in body.nests["LHS"] for x in nest.walk()):
        return k
    return next((n for n in range(k - k % 128, 0, -128) if k % n == 0 and fits(n)), k)


def _streams(b: Bound, body: Body, rhs: list[Place], rows: int) -> bool:
    """Whether the tensor core path fits: bf16 weights that the loader can bring, and an activation that bf16 holds."""
    if rows > STREAM_ROWS or any(x.dtype != "bf16" for x in rhs):
        return False
    wide = [a for a in b.roles("n") if b.extent[a] > 1]
    if len({bool(wide) and x.strides.get(wide[-1], 0) == 1 for x in rhs}) != 1:
        return False
    return all(exact_bf16(nest) for nest in body.nests["LHS"])


SMALL = ("i8", "u8", "bool")
"""Integers that bf16 holds exactly."""


def exact_bf16(nest: Nest) -> bool:
    """Whether bf16 holds every value of a nest, as far as its text says: rounded to it, or loaded from something smaller."""
    known: dict[Expr, bool] = {}
    for x in nest.walk():
        if isinstance(x, E.Load):
            known[x] = nest.place(x).dtype == "bf16"
        elif isinstance(x, E.Const):
            known[x] = bits(x) & 0xFFFF == 0
        elif isinstance(x, E.Unary):
            small = isinstance(x.a, E.Load) and nest.place(x.a).dtype in SMALL
            known[x] = (
                x.op == "round_bf16"
                or (x.op in ("neg", "abs") and known.get(x.a, False))
                or (x.op in ("i2f", "u2f") and small)
            )
        elif isinstance(x, E.Select):
            known[x] = known.get(x.a, False) and known.get(x.b, False)
    return known.get(nest.value, False)
