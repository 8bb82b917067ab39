"""The variants of CONTRACT: where operands and activation live, what is streamed, the functions of `cuda/tasks/contract.cuh`."""

from __future__ import annotations

import math

import numpy as np

from jax_mpk import abi
from jax_mpk.backends import cuda_variant
from jax_mpk.backends.cuda_code import DTYPES
from jax_mpk.backends.cuda_space import Scratch, Span
from jax_mpk.backends.cuda_variant import Builder, Op, Unit, codes_of, reduces


def contract(b: Builder, op: np.void, streamed: bool) -> tuple[str, Unit]:
    o = Op(b, op)
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
    lda = _row(KC) if streamed else K
    together = streamed and len(rhs) * M <= 16
    act, red = (
        M * lda * (2 if streamed else 4),
        (4 * M * (len(rhs) if together else 1) if streamed else 8 * min(M, 4)) * 64 * 4,
    )
    acc = len(rhs) * M * N * 4
    spill = 0
    if act > cuda_variant.ROOM:
        act_at, spill = spill, spill + -(-act // 128) * 128
    else:
        act_at, b.need.act = -1, max(b.need.act, act)
    if red + acc > cuda_variant.ROOM * 2 - 16384:
        acc_at, spill = spill, spill + -(-acc // 128) * 128
    else:
        acc_at = -1
    b.need.acc = max(b.need.acc, red + (acc if acc_at < 0 else 0))
    b.need.spill = max(b.need.spill, spill)
    type_ = "u32" if integer else "float"  # sums of integers wrap around
    kind = "BF16" if streamed else ""
    chunks = (Span((k[-1],), "k0", f"k0 + {KC}", KC),) if KC < K else ()
    act_scratch = Scratch("act_", kind, K, (*batch, *m), lda, col0="k0" if chunks else "0", shared=act_at < 0)
    lhs = o.function("lhs", ", int k0", codes_of(op, "LHS"), {abi.SLOT_ACT: act_scratch}, space, chunks)
    lhs = lhs.replace("{\n", "{\n    u8* act_ = act(w);\n", 1)
    accs = {abi.SLOT_ACC + j: Scratch(f"(acc(w) + {j * M * N * 4})") for j in range(len(rhs))}
    epilogue = o.function("epilogue", "", codes_of(op, "EPILOGUE"), accs, space)
    flat = "0"
    for a in (*batch, *m):
        flat = f"({flat}) * {o.extent[a]} + {space.lo(a)}" if flat != "0" else space.lo(a)
    pick = lambda f, what: f"static __device__ __forceinline__ {f} {{ return {what}; }}"  # noqa: E731
    choose = lambda values: " : ".join([*(f"j == {j} ? {v}" for j, v in enumerate(values[:-1])), str(values[-1])])  # noqa: E731
    parts = [f"using Sum = {type_};", o.range(), points,
             pick("int tile(const Range& r)", flat),
             pick("int rows(const Range& r)", o.product(m)), pick("int columns(const Range& r)", o.product(n)),
             o.place("act", "act", act, 0, act_at), o.place("red", "acc", red, 0, -1),
             o.place("acc", "acc", acc, red, acc_at)]  # fmt: skip
    if not streamed:
        number = "x" if integer else "f(x)"
        parts += [pick("const void* rhs(const Desc& d, int j)", choose([f"d.ptr[{int(x['slot'])}]" for x in rhs])),
                  pick("i64 rhs_offset(const Range& r, int j)", choose([f"({o.offset(x, range(0, k.start), space)})" for x in rhs])),
                  pick("i64 rhs_n(int j)", choose([s[0] for s in steps])), pick("i64 rhs_k(int j)", choose([s[1] for s in steps])),
                  pick("u32 load_rhs(const void* p, i64 i, int j)", choose([f"load<{DTYPES[int(x['dtype'])]}>(p, i)" for x in rhs])), pick("Sum number(u32 x)", number)]  # fmt: skip
    parts += [lhs, epilogue]
    call = "contract_stream<@>(w, d)" if streamed else "contract_direct<@>(w, d)"
    body = o.body(call, *parts, N_RHS=len(rhs), M=M, N=N, K=K, KC=KC, LDA=lda, LAYOUT=int(streamed), TOGETHER=together,
                  COLUMNS_INNER=bool(steps[0][0] == 1))  # fmt: skip
    return body, Unit(0, stream=streamed)


def _row(k: int) -> int:
    """Elements of an activation's row in shared memory: whole frames, and 16 bytes so that rows start in other banks."""
    return -(-k // 128) * 128 + 8


def _chunk(o: Op, k: range, M: int, K: int) -> int:
    """How much of a streamed contraction's K the activation in shared memory holds: all, or equal chunks of whole
    frames where the prologue can be cut. K where neither fits: then the activation goes to the workspace."""
    fits = lambda n: M * _row(n) * 2 <= cuda_variant.ROOM  # noqa: E731
    last = [a for a in k if o.extent[a] > 1] == [k[-1]]
    if fits(K) or not last or reduces(o.p, codes_of(o.op, "LHS")):
        return K
    return next((n for n in range(K - K % 128, 0, -128) if K % n == 0 and fits(n)), K)


def _step(x: np.void, axes: range, extent: list[int]) -> int:
    """The stride of the flattened index over `axes`."""
    real = [a for a in axes if extent[a] > 1]
    return int(x["stride"][real[-1]]) if real else 0


def _streams(o: Op, rhs: list[np.void], steps: list[tuple[int, int]], rows: int) -> bool:
    """Whether the tensor core path fits: bf16 weights, and an activation that bf16 holds exactly."""
    if rows > 64 or any(DTYPES[int(x["dtype"])] != "BF16" for x in rhs):
        return False
    if len({s[0] == 1 for s in steps}) != 1:
        return False
    return _exact_bf16(o.p, codes_of(o.op, "LHS"))


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
