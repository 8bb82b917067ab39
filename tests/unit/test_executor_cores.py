"""Contractions, attention, sorting and scans of the CPU executor: values, and bits that depend on nothing but the row."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jax_mpk import _ext, abi
from jax_mpk.ir import scalar
from tests.unit import executor_builder as eb
from tests.unit.executor_builder import Access, Builder, Code, Stage, V, instr

ISAS = _ext.info()["isas"]
BF16 = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _same_data_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


ENUM = {"F32": np.dtype(np.float32), "BF16": BF16, "F16": np.dtype(np.float16)}


def weights(k: int, n: int, dtype: str, layout: str) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The matrix [k, n] as float64, its memory, and (stride_n, stride_k)."""
    w = RNG.standard_normal((k, n)).astype(ENUM[dtype])
    if layout == "columns":
        return w.astype(np.float64), w, (1, n)
    if layout == "rows":
        return w.astype(np.float64), np.ascontiguousarray(w.T), (k, 1)
    return w.astype(np.float64), np.repeat(np.ascontiguousarray(w.T), 2, 1), (2 * k, 2)


def contract(
    x: np.ndarray,
    w: np.ndarray,
    n: int,
    strides: tuple[int, int],
    tile: tuple[int, int],
    dtype: str,
    integer: bool = False,
    **how: object,
) -> np.ndarray:
    m, k = x.shape
    b = Builder(workers=3)
    slots = b.arg(x.nbytes), b.arg(w.nbytes, dtype), b.result(4 * m * n)
    op = eb.matmul(b, "matmul", *slots, m, n, k, tile=tile, wtype=dtype, wstride=strides)
    if integer:
        b.rows["Op"][op]["params"][abi.enum("Param", "REDUCE_DTYPE")] = abi.enum("Dtype", "I32")
    b.tasks(op)
    out = np.zeros((m, n), np.float32)
    _ext.run(b.blob(), [x, w.view(np.uint8)], [out], poison=True, **how)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ENUM)
@pytest.mark.parametrize("layout", ["columns", "rows", "strided"])
@pytest.mark.parametrize("k", [1, 8, 77, 300])
def test_contractions(layout: str, dtype: str, k: int, isa: str) -> None:
    """Every number of rows that takes a path of its own, columns that divide nothing."""
    for m in (1, 2, 3, 4, 5, 6, 7, 13, 40):
        for n in (1, 2, 37, 150):
            wide, w, strides = weights(k, n, dtype, layout)
            x = RNG.standard_normal((m, k)).astype(np.float32)
            have = contract(x, w, n, strides, (16, 64), dtype, isa=isa)
            bound = 5e-7 * (np.abs(x) @ np.abs(wide)) + 1e-6  # sums in f32: relative to the size of the terms
            assert (np.abs(have - x.astype(np.float64) @ wide) <= bound).all(), f"{m}x{n}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("layout", ["columns", "rows", "strided"])
def test_a_row_depends_on_itself_only(layout: str, dtype: str, isa: str) -> None:
    """Not on the number of rows, on its neighbours, on the tile, or on the threads."""
    k, n = 203, 170
    _, w, strides = weights(k, n, dtype, layout)
    x = RNG.standard_normal((30, k)).astype(np.float32)
    want = contract(x, w, n, strides, (30, n), dtype, isa=isa, threads=1)
    for tile in ((1, 64), (6, 16), (7, 33), (16, 128), (30, 1)):
        have = contract(x, w, n, strides, tile, dtype, isa=isa, threads=3)
        assert have.tobytes() == want.tobytes(), tile
    for m in (1, 2, 5, 6, 9, 13, 25):
        assert contract(x[:m], w, n, strides, (m, 64), dtype, isa=isa).tobytes() == want[:m].tobytes(), m
        y = x[:m].copy()
        y[:-1] = np.nan
        assert contract(y, w, n, strides, (m, 64), dtype, isa=isa)[-1].tobytes() == want[m - 1].tobytes(), m


INTS = {
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("layout", ["columns", "rows", "strided"])
def test_contractions_of_integers(layout: str, dtype: str, isa: str) -> None:
    """Exact modulo 2**32, with activations of 16 bits (two products at a time) and of 32; every number of rows and columns."""
    top = 2 if dtype == "BOOL" else np.iinfo(INTS[dtype]).max
    low = 0 if dtype == "BOOL" else np.iinfo(INTS[dtype]).min
    for k, act in ((1, 1 << 31), (77, 1 << 15), (300, 1 << 15), (530, 1 << 31)):
        for m, n in ((1, 37), (2, 2), (3, 150), (7, 33), (13, 16)):
            w = RNG.integers(low, top, (k, n), endpoint=dtype != "BOOL").astype(INTS[dtype])
            x = RNG.integers(-act, act, (m, k)).astype(np.int32)
            x.reshape(-1)[0] = -act  # the extremes too
            held = w if layout == "columns" else np.ascontiguousarray(w.T)
            held, strides = (
                (np.repeat(held, 2, 1), (2 * k, 2))
                if layout == "strided"
                else (held, (1, n) if layout == "columns" else (k, 1))
            )
            have = contract(x.view(np.float32), held, n, strides, (5, 64), dtype, integer=True, isa=isa).view(np.int32)
            want = (
                (x.astype(np.int64).astype(np.uint64) @ w.astype(np.int64).astype(np.uint64))
                .astype(np.uint32)
                .view(np.int32)
            )
            np.testing.assert_array_equal(have, want, f"{m}x{k}x{n}")


def test_vector_instruction_sets_agree() -> None:
    """With fused multiply-add the order is everything: wider vectors give the same bits."""
    vector = [i for i in ISAS if i in ("avx2", "avx512", "neon")]
    for layout in ("columns", "rows", "strided"):
        _, w, strides = weights(301, 90, "BF16", layout)
        x = RNG.standard_normal((5, 301)).astype(np.float32)
        outs = {contract(x, w, 90, strides, (5, 64), "BF16", isa=isa).tobytes() for isa in vector}
        assert len(outs) <= 1


def test_equal_prologues_are_computed_once() -> None:
    """Two operators over one activation: the second must not see the activation of another m tile."""
    m, n, k = 20, 96, 64
    x, v, w = (RNG.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n), (k, n)))
    b = Builder(workers=1)
    slots = [b.arg(a.nbytes) for a in (x, v, w)] + [b.result(4 * m * n) for _ in range(2)]
    ops = [
        eb.matmul(b, f"matmul{j}", slots[0], slots[1 + j], slots[3 + j], m, n, k, tile=(8, 32), prologue=7)
        for j in range(2)
    ]
    for index in range(b.grids[0]):  # alternate operators and tiles
        b.task(ops[0], index, 0)
        b.task(ops[1], b.grids[0] - 1 - index, 0)
    p, q = np.zeros((m, n), np.float32), np.zeros((m, n), np.float32)
    for seed in (-1, 0, 1):
        _ext.run(b.blob(), [x, v, w], [p, q], threads=1, poison=True, seed=seed)
        np.testing.assert_allclose(p, x @ v, atol=1e-4)
        np.testing.assert_allclose(q, x @ w, atol=1e-4)


@pytest.mark.parametrize("batch_tile", [1, 3])
def test_batches_and_several_axes(batch_tile: int) -> None:
    """out[b, m0, m1, n0, n1] = sum over k0, k1 of x[b, m0, m1, k0, k1] * w[b, k0, k1, n0, n1]; the sum of two."""
    nb, m0, m1, n0, n1, k0, k1 = 3, 4, 2, 5, 6, 3, 7
    x = RNG.standard_normal((nb, m0, m1, k0, k1)).astype(np.float32)
    v, w = (RNG.standard_normal((nb, k0, k1, n0, n1)).astype(np.float32) for _ in range(2))
    k, n = k0 * k1, n0 * n1
    b = Builder()
    slots = [b.arg(a.nbytes) for a in (x, v, w)] + [b.result(4 * nb * m0 * m1 * n)]
    extent, tile = (nb, m0, m1, n0, n1, k0, k1), (batch_tile, 3, m1, 2, n1, k0, k1)
    box = {a: (0, e) for a, e in enumerate(extent)}
    lhs = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [
            Access(0, stride=(m0 * m1 * k, m1 * k, k, 0, 0, k1, 1)),
            Access(abi.SLOT_ACT, stride=(0, m1 * k, k, 0, 0, k1, 1)),
        ],
        {a: box[a] for a in (0, 1, 2, 5, 6)},
        6,
    )
    row = 2 * n1
    acc = tuple(Access(abi.SLOT_ACC + j, stride=(0, m1 * row, row, n1, 1)) for j in range(2))
    body = [
        instr("LOAD", V),
        instr("LOAD", V + 1, aux=1),
        instr("F_ADD", V + 2, V, V + 1),
        instr("STORE", a=V + 2, aux=2),
    ]
    epilogue = Code(
        [Stage("VECTOR", body)],
        [*acc, Access(3, stride=(m0 * m1 * n, m1 * n, n, n1, 1))],
        {a: box[a] for a in range(5)},
        4,
    )
    rhs = [Access(1 + j, "F32", (k * n, 0, 0, n1, 1, k1 * n, n)) for j in range(2)]
    params = dict(RHS0=0, RHS1=1, N_RHS=2, N_BATCH=1, N_M=2, N_N=2, N_K=2)
    b.tasks(
        b.op(
            "CONTRACT", "batched", extent, tile, slots, {"LHS": [lhs], "EPILOGUE": [epilogue]}, rhs, params, prologue=3
        )
    )
    out = np.zeros((nb, m0, m1, n0, n1), np.float32)
    _ext.run(b.blob(), [x, v, w], [out], poison=True)
    np.testing.assert_allclose(out, np.einsum("bmpkl,bklnq->bmpnq", x, v + w), atol=1e-4)


def test_integer_contraction() -> None:
    m, n, k = 3, 20, 50
    x = RNG.integers(-(2**31), 2**31, (m, k)).astype(np.int32)
    w = RNG.integers(-128, 128, (k, n)).astype(np.int8)
    b = Builder()
    slots = [b.arg(x.nbytes, "I32"), b.arg(w.nbytes, "I8"), b.result(4 * m * n, "I32")]
    copy = [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])]
    lhs = Code(copy, [Access(0, "I32", (k, 0, 1)), Access(abi.SLOT_ACT, "I32", (k, 0, 1))], {0: (0, m), 2: (0, k)}, 2)
    end = Code(copy, [Access(abi.SLOT_ACC, "I32", (8, 1)), Access(2, "I32", (n, 1))], {0: (0, m), 1: (0, n)}, 1)
    params = dict(N_RHS=1, N_M=1, N_N=1, N_K=1, REDUCE_DTYPE=abi.enum("Dtype", "I32"))
    b.tasks(
        b.op(
            "CONTRACT",
            "ints",
            (m, n, k),
            (2, 8, k),
            slots,
            {"LHS": [lhs], "EPILOGUE": [end]},
            [Access(1, "I8", (0, 1, n))],
            params,
        )
    )
    out = np.zeros((m, n), np.int32)
    _ext.run(b.blob(), [x, w], [out])
    np.testing.assert_array_equal(out, (x.astype(np.int64) @ w).astype(np.int32))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, limit: int | None, rows: int, **how: object) -> np.ndarray:
    """q [heads, group, d], k [keys, heads, d], v [keys, heads, e]: out [heads, group, e]; the scale is 1/2."""
    heads, group, d = q.shape
    keys, e = k.shape[0], v.shape[2]
    kind = "BF16" if k.dtype == BF16 else "F32"
    b = Builder()
    slots = [
        b.arg(q.nbytes),
        b.arg(k.nbytes, kind),
        b.arg(v.nbytes, kind),
        b.arg(4, "I32"),
        b.result(4 * heads * group * e),
    ]
    extent, tile = (heads, group, e, keys, d), (1, rows, e, keys, d)

    def loop(*axes: int) -> dict[int, tuple[int, int]]:
        return {a: (0, extent[a]) for a in axes}

    copy = [instr("LOAD", V), instr("STORE", a=V, aux=1)]
    half = [
        instr("LOAD", V),
        instr("CONST", V + 1, imm=0.5),
        instr("F_MUL", V + 2, V, V + 1),
        instr("STORE", a=V + 2, aux=0),
    ]
    score = Access(abi.SLOT_ACC, stride=(0, keys, 0, 1, 0))
    codes = {
        "Q": [
            Code(
                [Stage("VECTOR", copy)],
                [Access(0, stride=(group * d, d, 0, 0, 1)), Access(abi.SLOT_ACT, stride=(0, d, 0, 0, 1))],
                loop(1, 4),
                4,
            )
        ],
        "SCORE": [Code([Stage("VECTOR", half)], [score], loop(1, 3), 3)],
        "EPILOGUE": [
            Code(
                [Stage("VECTOR", copy)],
                [Access(abi.SLOT_ACC + 1, stride=(0, e, 1)), Access(4, stride=(group * e, e, 1))],
                loop(1, 2),
                2,
            )
        ],
    }
    if limit is not None:
        codes["LIMIT"] = [
            Code(
                [Stage("SCALAR", [instr("LOAD", 0), instr("STORE", a=0, aux=1)])],
                [Access(3, "I32"), Access(abi.SLOT_LIMIT, "I32")],
                {},
            )
        ]
    core = [Access(1, kind, (d, 0, 0, heads * d, 1)), Access(2, kind, (e, 0, 1, heads * e, 0))]
    b.tasks(b.op("ATTENTION", "attention", extent, tile, slots, codes, core, dict(N_BATCH=1, N_ROWS=1, KEY=0, VALUE=1)))
    out = np.zeros((heads, group, e), np.float32)
    args = [q, k.view(np.uint8), v.view(np.uint8), np.array([keys if limit is None else limit], np.int32)]
    _ext.run(b.blob(), args, [out], poison=True, **how)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("limit", [None, 1, 17, 300, 999, -5])
def test_attention(limit: int | None, dtype: np.dtype, isa: str) -> None:
    heads, group, d, e, keys = 3, 5, 24, 40, 333
    q = RNG.standard_normal((heads, group, d)).astype(np.float32)
    k, v = RNG.standard_normal((keys, heads, d)).astype(dtype), RNG.standard_normal((keys, heads, e)).astype(dtype)
    n = keys if limit is None else min(max(limit, 1), keys)
    k[n:], v[n:] = np.nan, np.nan  # keys beyond the limit are not read
    have = attention(q, k, v, limit, 2, isa=isa)
    s = np.einsum("hgd,shd->hgs", q, k[:n].astype(np.float64)) / 2
    p = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("hgs,she->hge", p / p.sum(-1, keepdims=True), v[:n].astype(np.float64))
    np.testing.assert_allclose(have, want, atol=1e-5)
    assert attention(q, k, v, limit, 5, isa=isa).tobytes() == have.tobytes()


def sort(x: np.ndarray, count: int, descending: bool, positions: bool, **how: object) -> np.ndarray:
    rows, n = x.shape
    kind = {"f": "F32", "i": "I32", "u": "U32"}[x.dtype.kind]
    b = Builder()
    slots = [b.arg(x.nbytes, kind), b.result(4 * rows * count, "I32" if positions else kind)]
    code = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [Access(0, kind, (n, 1)), Access(abi.SLOT_ACC, kind, (0, 1))],
        {0: (0, rows), 1: (0, n)},
        1,
    )
    params = dict(
        KEY_DTYPE=abi.enum("Dtype", kind), COUNT=count, OUT=0, DESCENDING=int(descending), PAYLOAD=int(positions)
    )
    b.tasks(
        b.op(
            "SORT",
            "sort",
            (rows, n),
            (2, n),
            slots,
            {"MAIN": [code]},
            [Access(1, "I32" if positions else kind, (count, 1))],
            params,
        )
    )
    out = np.zeros((rows, count), np.int32 if positions else x.dtype)
    _ext.run(b.blob(), [x], [out], poison=True, **how)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 9, 400])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint32])
def test_sort(kind: type, descending: bool, count: int, isa: str) -> None:
    """Stable; NaN is the greatest; zeros are equal."""
    x = RNG.integers(-30, 30, (5, 400)).astype(np.int32).astype(kind)
    if kind is np.float32:
        x[:, ::7], x[:, 3::11], x[:, 5::13] = np.nan, -0.0, 0.0
        x[2, 8], x[3, 9] = np.inf, -np.inf
    key = np.where(np.isnan(x), np.inf, x.astype(np.float64))
    key = [(bool(np.isnan(a)), float(b)) for a, b in zip(x.ravel(), key.ravel(), strict=True)]
    want = np.zeros((5, count), np.int32)
    for r in range(5):
        row = key[400 * r : 400 * (r + 1)]
        order = sorted(range(400), key=lambda i: row[i])  # noqa: B023
        if descending:
            order = sorted(range(400), key=lambda i: (-row[i][0], -row[i][1]))  # noqa: B023
        want[r] = order[:count]
    np.testing.assert_array_equal(sort(x, count, descending, True, isa=isa), want)
    values = sort(x, count, descending, False, isa=isa)
    assert values.tobytes() == np.take_along_axis(x, want, 1).tobytes()


def scan(x: np.ndarray, how: str, reverse: bool, row_tile: int = 0, kind: str = "", **how_to: object) -> np.ndarray:
    rows, n = x.shape
    kind = kind or {"f": "F32", "i": "I32", "u": "U32"}[x.dtype.kind]
    b = Builder()
    slots = [b.arg(x.nbytes, kind), b.result(4 * rows * n, kind)]
    box = {0: (0, rows), 1: (0, n)}
    load, store = instr("LOAD", V), instr("STORE", a=V, aux=1)
    memory, acc = Access(0, kind, (n, 1)), Access(abi.SLOT_ACC, kind, (0, 1))
    codes = {
        "MAIN": [Code([Stage("VECTOR", [load, store])], [memory, acc], box, 1)],
        "EPILOGUE": [Code([Stage("VECTOR", [load, store])], [acc, Access(1, kind, (n, 1))], box, 1)],
    }
    params = dict(REDUCE_DTYPE=abi.enum("Dtype", kind), SCAN_OP=abi.enum("ScanOp", how), REVERSE=int(reverse))
    b.tasks(b.op("SCAN", "scan", (rows, n), (2, row_tile or n), slots, codes, [], params))
    out = np.zeros_like(x)
    _ext.run(b.blob(), [x], [out], poison=True, **how_to)
    return out


def in_runs(how: str, x: np.ndarray, neutral: float) -> np.ndarray:
    """The order of the program format, spelt out."""
    out, before = x.copy(), None
    for first in range(0, x.shape[1], abi.SCAN_RUN):
        acc = np.full(x.shape[0], neutral, x.dtype)
        for i in range(first, min(first + abi.SCAN_RUN, x.shape[1])):
            acc = scalar.combine(how, acc, x[:, i])
            out[:, i] = acc if before is None else scalar.combine(how, before, acc)
        before = out[:, i].copy()
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 49, 255, 256, 257, 4095, 4096, 4097, 9000])
def test_scan(n: int, reverse: bool, isa: str) -> None:
    """The bits of the order that the format fixes, whatever the instruction set and the threads; exact integers."""
    x = RNG.normal(size=(5, n)).astype(np.float32)
    special = x.copy()
    special[:, ::7], special[1, n // 2], special[2, n // 3], special[3, n // 2] = -0.0, np.nan, np.inf, -np.inf
    bits = RNG.integers(0, 1 << 32, (5, n), np.uint32)
    turn = slice(None, None, -1 if reverse else 1)
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    with np.errstate(all="ignore"):
        for how, y, neutral in (
            ("sum", x, 0), ("sum", special, 0), ("prod", 1 + x / 100, 1), ("max", special, -np.inf), ("min", special, np.inf),
            ("sum", bits, 0), ("prod", bits, 1), ("max", bits, 0), ("min", bits, 2**32 - 1),
            ("sum", bits.view(np.int32), 0), ("prod", bits.view(np.int32), 1), ("max", bits.view(np.int32), low),
            ("min", bits.view(np.int32), high),
        ):  # fmt: skip
            y = np.ascontiguousarray(y)
            want = in_runs(how, y[:, turn], neutral)[:, turn]
            for threads in (1, 3):
                have = scan(y, how.upper(), reverse, isa=isa, threads=threads)
                same = (have.view(np.uint32) == want.view(np.uint32)) | (np.isnan(have) & np.isnan(want))
                assert same.all(), (how, y.dtype)
        want = in_runs("logsumexp", x[:, turn] * 9, -np.inf)[:, turn]
        np.testing.assert_allclose(scan(x * 9, "LOGSUMEXP", reverse, isa=isa), want, rtol=1e-5, atol=1e-5)


def test_scans_that_are_refused() -> None:
    x = np.zeros((4, 64), np.float32)
    with pytest.raises(_ext.ProgramError, match="row axis 1 is tiled"):
        scan(x, "SUM", False, row_tile=32)
    with pytest.raises(_ext.ProgramError, match="scans type"):
        scan(x.astype(np.int32), "LOGSUMEXP", False)
    with pytest.raises(_ext.ProgramError, match="scans type"):
        scan(x, "SUM", False, kind="BF16")
