"""Instructions, reductions and element types of the CPU executor, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import math
import platform

import ml_dtypes
import numpy as np
import pytest

from jax_mpk import _ext, abi
from tests.unit.executor_builder import Access, Builder, Code, Stage, V, instr

ISAS = _ext.info()["isas"]
RNG = np.random.default_rng(3)
F32 = np.dtype(np.float32)


def apply(op: str, isa: str, *xs: np.ndarray, out: np.dtype = F32) -> np.ndarray:
    """One instruction on whole arrays of 32-bit elements."""
    n = xs[0].size
    b = Builder()
    slots = [b.arg(4 * n) for _ in xs] + [b.result(4 * n)]
    names = {"f": "F32", "i": "I32", "u": "U32"}
    accesses = [Access(j, names[a.dtype.kind], (1,)) for j, a in enumerate([*xs, np.zeros(0, out)])]
    body = [instr("LOAD", V + j, aux=j) for j in range(len(xs))]
    body += [instr(op, V + 8, V, V + 1, V + 2), instr("STORE", a=V + 8, aux=len(xs))]
    b.tasks(b.op("ROWS", op, (n,), (97,), slots, {"MAIN": [Code([Stage("VECTOR", body)], accesses, {0: (0, n)}, 0)]}))
    y = np.zeros(n, out)
    _ext.run(b.blob(), list(xs), [y], poison=True, isa=isa)
    return y


SPECIAL = np.array(
    [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, -3e38, 0.5, -0.5, 2.5, 1e-3], np.float32
)


def floats(lo: float, hi: float, n: int = 3000) -> np.ndarray:
    return np.concatenate([RNG.uniform(lo, hi, n).astype(np.float32), SPECIAL])


def spread() -> np.ndarray:
    """Every magnitude, both signs."""
    bits = RNG.integers(0, 1 << 32, 4000, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([bits.view(np.float32), SPECIAL])


def ulps(have: np.ndarray, want: np.ndarray) -> float:
    """The largest error in units of the last place of the exact result; infinities and NaN must agree."""
    with np.errstate(over="ignore"):
        want32 = want.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(have), np.isnan(want32))
    finite = np.isfinite(want32) & np.isfinite(have)
    special = ~finite & ~np.isnan(want32)
    edge = np.abs(want[special]) >= 3.4028234e38  # the exact result is at the edge of overflow
    assert np.all((have[special] == want32[special]) | edge)
    size = np.spacing(np.maximum(np.abs(want32[finite]), np.float32(1.2e-38)).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(have[finite].astype(np.float64) - want[finite]) / size, initial=0))


UNARY = {
    "F_EXP": (np.exp, floats(-110, 95), 2),
    "F_EXP2": (np.exp2, floats(-155, 132), 2),
    "F_EXPM1": (np.expm1, np.concatenate([floats(-40, 90), floats(-1, 1)]), 2.5),
    "F_LOG": (np.log, np.abs(spread()), 2),
    "F_LOG1P": (np.log1p, np.concatenate([floats(-1, 4), floats(0, 1e30)]), 2.5),
    "F_SQRT": (np.sqrt, spread(), 0.51),
    "F_RSQRT": (lambda x: 1 / np.sqrt(x), np.abs(spread()), 1.6),
    "F_CBRT": (np.cbrt, spread(), 1.1),
    "F_TANH": (np.tanh, np.concatenate([floats(-12, 12), floats(-1, 1)]), 2.5),
    "F_SIN": (np.sin, np.concatenate([floats(-1e5, 1e5), floats(-4, 4)]), 2),
    "F_COS": (np.cos, np.concatenate([floats(-1e5, 1e5), floats(-4, 4)]), 2),
    "F_TAN": (np.tan, np.concatenate([floats(-1e3, 1e3), floats(-1.5, 1.5)]), 3.5),
    "F_LOGISTIC": (lambda x: 1 / (1 + np.exp(-x)), floats(-80, 60), 3.5),
    "F_ERF": (np.vectorize(math.erf, otypes=[np.float64]), np.concatenate([floats(-6, 6), floats(-0.9, 0.9)]), 2.5),
    "F_NEG": (np.negative, spread(), 0),
    "F_ABS": (np.abs, spread(), 0),
    "F_SIGN": (lambda x: np.copysign(np.sign(x), x), spread(), 0),
    "F_FLOOR": (np.floor, floats(-1e7, 1e7), 0),
    "F_CEIL": (np.ceil, floats(-9, 9), 0),
    "F_ROUND_EVEN": (np.rint, np.concatenate([floats(-9, 9), np.arange(-40, 40, dtype=np.float32) / 4]), 0),
    "F_ROUND_BF16": (lambda x: x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64), spread(), 0),
    "F_ROUND_F16": (
        lambda x: x.astype(np.float32).astype(np.float16).astype(np.float64),
        np.concatenate([floats(-7e4, 7e4), floats(-1e-5, 1e-5), floats(-1, 1)]),
        0,
    ),
    "F_ROUND_AWAY": (lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), np.arange(-40, 40, dtype=np.float32) / 4, 0),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str, isa: str) -> None:
    f, x, bound = UNARY[op]
    with np.errstate(all="ignore"):
        want = f(x.astype(np.float64))
    have = apply(op, isa, x)
    assert ulps(have, want) <= bound
    zero = (want == 0) & (have == 0)
    if op not in ("F_ROUND_F16", "F_ROUND_BF16", "F_COS"):
        np.testing.assert_array_equal(np.signbit(have[zero]), np.signbit(want[zero]))


def pairs(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    grid = np.array([(a, b) for a in SPECIAL for b in SPECIAL], np.float32)
    x, y = RNG.uniform(-30, 30, n), RNG.uniform(-20, 20, n)
    y[::3] = np.rint(y[::3])
    x[::2] = np.abs(x[::2])
    return np.concatenate([x.astype(np.float32), grid[:, 0]]), np.concatenate([y.astype(np.float32), grid[:, 1]])


BINARY = {
    "F_ADD": (np.add, 0.51),
    "F_SUB": (np.subtract, 0.51),
    "F_MUL": (np.multiply, 0.51),
    "F_DIV": (np.divide, 0.51),
    "F_REM": (np.fmod, 0.51),
    "F_MAX": (np.maximum, 0),
    "F_MIN": (np.minimum, 0),
    "F_POW": (np.power, 1),
    "F_ATAN2": (np.arctan2, 2),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op: str, isa: str) -> None:
    f, bound = BINARY[op]
    x, y = pairs()
    with np.errstate(all="ignore"):
        want = f(x.astype(np.float64), y.astype(np.float64))
    assert ulps(apply(op, isa, x, y), want) <= bound


COMPARE = {"F_LT": np.less, "F_LE": np.less_equal, "F_EQ": np.equal, "F_NE": np.not_equal}


@pytest.mark.parametrize("isa", ISAS)
def test_comparisons_and_conversions(isa: str) -> None:
    x, y = pairs(500)
    for op, f in COMPARE.items():
        np.testing.assert_array_equal(apply(op, isa, x, y, out=np.dtype(np.int32)), f(x, y))
    z = spread()
    with np.errstate(all="ignore"):
        wide = np.where(np.isnan(z), 0, np.trunc(z.astype(np.float64)))
        np.testing.assert_array_equal(
            apply("F_TO_I", isa, z, out=np.dtype(np.int32)), np.clip(wide, -(2.0**31), 2.0**31 - 1)
        )
        np.testing.assert_array_equal(apply("F_TO_U", isa, z, out=np.dtype(np.uint32)), np.clip(wide, 0, 2.0**32 - 1))
    np.testing.assert_array_equal(apply("F_TO_B", isa, z, out=np.dtype(np.int32)), z != 0)
    np.testing.assert_array_equal(apply("F_IS_FINITE", isa, z, out=np.dtype(np.int32)), np.isfinite(z))
    i = RNG.integers(-(2**31), 2**31, 300).astype(np.int32)
    np.testing.assert_array_equal(apply("I_TO_F", isa, i), i.astype(np.float32))
    np.testing.assert_array_equal(apply("U_TO_F", isa, i.view(np.uint32)), i.view(np.uint32).astype(np.float32))


def integer(op: str, a: int, b: int) -> int:
    """The definition, on Python integers."""
    ua, ub = a & 0xFFFFFFFF, b & 0xFFFFFFFF
    signed = {
        "I_ADD": lambda: a + b,
        "I_SUB": lambda: a - b,
        "I_MUL": lambda: a * b,
        "I_AND": lambda: a & b,
        "I_OR": lambda: a | b,
        "I_XOR": lambda: a ^ b,
        "I_MAX": lambda: max(a, b),
        "I_MIN": lambda: min(a, b),
        "U_MAX": lambda: max(ua, ub),
        "U_MIN": lambda: min(ua, ub),
        "I_DIV": lambda: -1 if b == 0 else int(math.copysign(abs(a) // abs(b), a * b)) if a * b else 0,
        "I_REM": lambda: a if b == 0 else a - b * (abs(a) // abs(b) * (1 if a * b > 0 else -1)),
        "U_DIV": lambda: ua // ub if ub else -1,
        "U_REM": lambda: ua % ub if ub else ua,
        "I_SHL": lambda: a << ub if ub < 32 else 0,
        "I_SHR": lambda: ua >> ub if ub < 32 else 0,
        "I_SAR": lambda: a >> min(ub, 31),
        "I_LT": lambda: a < b,
        "U_LT": lambda: ua < ub,
        "I_LE": lambda: a <= b,
        "U_LE": lambda: ua <= ub,
        "I_EQ": lambda: a == b,
        "I_NE": lambda: a != b,
        "I_POW": lambda: pow(a, b, 1 << 32) if b >= 0 else (1 if a == 1 else (-1) ** (b & 1) if a == -1 else 0),
    }
    return (int(signed[op]()) + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "op",
    "I_ADD I_SUB I_MUL I_DIV U_DIV I_REM U_REM I_MAX U_MAX I_MIN U_MIN I_POW I_AND I_OR I_XOR "
    "I_SHL I_SHR I_SAR I_LT U_LT I_LE U_LE I_EQ I_NE".split(),
)
def test_integers(op: str, isa: str) -> None:
    edge = [0, 1, -1, 2, 7, 31, 32, 33, -7, 2**31 - 1, -(2**31), 12345]
    some = RNG.integers(-(2**31), 2**31, 150).tolist()
    a = np.array([x for x in edge for _ in edge] + some, np.int64).astype(np.int32)
    b = np.array([y for _ in edge for y in edge] + RNG.integers(-40, 40, 150).tolist(), np.int64).astype(np.int32)
    want = [integer(op, int(x), int(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(apply(op, isa, a, b, out=np.dtype(np.int32)), want)


@pytest.mark.parametrize("isa", ISAS)
def test_integer_unary_and_select(isa: str) -> None:
    a = np.concatenate([RNG.integers(-(2**31), 2**31, 100), [0, 1, -1, -(2**31)]]).astype(np.int32)
    ints = np.dtype(np.int32)
    np.testing.assert_array_equal(apply("I_NOT", isa, a, out=ints), ~a)
    np.testing.assert_array_equal(apply("I_SIGN", isa, a, out=ints), np.sign(a))
    np.testing.assert_array_equal(apply("I_ABS", isa, a, out=ints), np.where(a < 0, -a, a))
    np.testing.assert_array_equal(apply("I_POPCOUNT", isa, a, out=ints), [(int(x) & 0xFFFFFFFF).bit_count() for x in a])
    np.testing.assert_array_equal(
        apply("I_CLZ", isa, a, out=ints), [32 - (int(x) & 0xFFFFFFFF).bit_length() for x in a]
    )
    for op, t in (("I_WRAP_I8", np.int8), ("I_WRAP_U8", np.uint8), ("I_WRAP_I16", np.int16), ("I_WRAP_U16", np.uint16)):
        np.testing.assert_array_equal(apply(op, isa, a, out=ints), a.astype(t))
    c = RNG.integers(0, 2, a.size).astype(np.int32)
    np.testing.assert_array_equal(apply("SELECT", isa, c, a, ~a, out=ints), np.where(c, a, ~a))


MEMORY = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", MEMORY)
@pytest.mark.parametrize("stride", [1, 3])
def test_element_types(dtype: str, stride: int, isa: str) -> None:
    """A load widens exactly; a store rounds to nearest even or wraps. Neighbours in memory are left alone."""
    t = np.dtype(MEMORY[dtype])
    floating = dtype in ("F32", "BF16", "F16")
    wide = spread()[:700] if floating else RNG.integers(-(2**31), 2**31, 700).astype(np.int32)
    if dtype == "F16":
        wide = np.concatenate([wide, floats(-7e4, 7e4), floats(-1e-4, 1e-4), floats(-1e-7, 1e-7)])
    n, name = wide.size, "F32" if floating else "I32"
    b = Builder()
    x, y, z = b.arg(4 * n), b.result(n * stride * t.itemsize), b.result(4 * n)
    there = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [Access(0, name, (1,)), Access(1, dtype, (stride,))],
        {0: (0, n)},
        0,
    )
    back = Code(
        [Stage("VECTOR", [instr("LOAD", V, aux=0), instr("STORE", a=V, aux=1)])],
        [Access(0, dtype, (stride,)), Access(1, name, (1,))],
        {0: (0, n)},
        0,
    )
    e = b.event(-(-n // 100))
    b.tasks(b.op("ROWS", "there", (n,), (100,), [x, y], {"MAIN": [there]}), triggers=(e,))
    b.tasks(b.op("ROWS", "back", (n,), (70,), [y, z], {"MAIN": [back]}), waits=(e,))
    narrow, again = np.zeros(n * stride, t), np.zeros(n, wide.dtype)
    _ext.run(b.blob(), [wide], [narrow.view(np.uint8), again], poison=True, isa=isa)
    with np.errstate(all="ignore"):
        want = wide.astype(t)
    assert np.all((narrow[::stride] == want) | ((narrow[::stride] != narrow[::stride]) & (want != want)))
    widened = want.astype(wide.dtype)
    assert np.all((again == widened) | ((again != again) & (widened != widened)))
    if stride > 1:
        assert np.all(narrow.view(np.uint8).reshape(n, -1)[:, t.itemsize :] == 0xFF)


def reduce_program(
    op: str, dtype: str, rows: int, shape: tuple[int, ...], lo: tuple[int, ...], hi: tuple[int, ...]
) -> bytes:
    n, size = len(shape), math.prod(shape)
    b = Builder()
    x, y = b.arg(4 * rows * size), b.result(4 * rows)
    strides = (size, *(math.prod(shape[d + 1 :]) for d in range(n)))
    code = Code(
        [
            Stage("REDUCE", [instr("LOAD", V)], op, dtype, 1, lo, hi, V, 5),
            Stage("SCALAR", [instr("STORE", a=5, aux=1)]),
        ],
        [Access(0, dtype, strides), Access(1, "I32" if op.startswith("ARG") else dtype, (1,))],
        {0: (0, rows)},
    )
    b.tasks(b.op("ROWS", op, (rows,), (2,), [x, y], {"MAIN": [code]}))
    return b.blob()


def fixed_order(op: str, row: np.ndarray) -> np.generic:
    """The reduction as the format defines it."""
    f = {"SUM": np.add, "PROD": np.multiply, "MAX": np.maximum, "MIN": np.minimum}[op]
    start = {"SUM": 0, "PROD": 1, "MAX": -np.inf, "MIN": np.inf}[op]
    p = [row.dtype.type(start)] * abi.LANES
    for i, v in enumerate(row):
        p[i % abi.LANES] = f(p[i % abi.LANES], v)
    half = abi.LANES // 2
    while half:
        p = [f(p[j], p[j + half]) for j in range(half)]
        half //= 2
    return p[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ["SUM", "MAX", "MIN", "PROD"])
@pytest.mark.parametrize("shape", [(5,), (16,), (700,), (3, 37), (4, 5, 6)])
def test_reductions_have_one_order(op: str, shape: tuple[int, ...], isa: str) -> None:
    x = RNG.standard_normal((5, *shape)).astype(np.float32)
    y = np.zeros(5, np.float32)
    _ext.run(reduce_program(op, "F32", 5, shape, (0,) * len(shape), shape), [x], [y], poison=True, isa=isa)
    want = np.array([fixed_order(op, row.ravel()) for row in x], np.float32)
    assert y.tobytes() == want.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_reductions_of_integers_and_parts(isa: str) -> None:
    x = RNG.integers(-(2**31), 2**31, (5, 3, 40)).astype(np.int32)
    y = np.zeros(5, np.int32)
    part = x[:, 1:3, 7:31].reshape(5, -1)
    with np.errstate(over="ignore"):
        wants = {
            "SUM": part.sum(1, dtype=np.int32),
            "MAX": part.max(1),
            "MIN": part.min(1),
            "AND": np.bitwise_and.reduce(part, 1),
            "OR": np.bitwise_or.reduce(part, 1),
            "PROD": np.multiply.reduce(part, 1, dtype=np.int32),
        }
    for op, want in wants.items():
        _ext.run(reduce_program(op, "I32", 5, (3, 40), (1, 7), (3, 31)), [x], [y], isa=isa)
        np.testing.assert_array_equal(y, want, op)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_first_extreme_wins_and_nan_is_one(n: int, isa: str) -> None:
    x = RNG.integers(-3, 4, (4, n)).astype(np.float32)
    x[1, n // 2 :] = np.nan
    x[2] = -np.inf
    x[3] = np.inf
    y = np.zeros(4, np.int32)
    for op, f in (("ARGMAX", np.argmax), ("ARGMIN", np.argmin)):
        _ext.run(reduce_program(op, "F32", 4, (n,), (0,), (n,)), [x], [y], poison=True, isa=isa)
        np.testing.assert_array_equal(y, f(x, 1), op)
        if n > 2:
            _ext.run(reduce_program(op, "F32", 4, (n,), (1,), (n,)), [x], [y], poison=True, isa=isa)
            np.testing.assert_array_equal(y, 1 + f(x[:, 1:], 1), op)


@pytest.mark.parametrize("isa", ISAS)
def test_accumulated_reduction(isa: str) -> None:
    """Two ranges of one sum: the second result is added to the first."""
    x = RNG.standard_normal((1, 100)).astype(np.float32)
    b = Builder()
    slots = [b.arg(400), b.result(4)]
    stages = [
        Stage("REDUCE", [instr("LOAD", V)], "SUM", "F32", 1, (lo,), (hi,), V, 3, flags)
        for lo, hi, flags in ((0, 30, 0), (30, 100, abi.ACCUMULATE))
    ]
    code = Code(
        [*stages, Stage("SCALAR", [instr("STORE", a=3, aux=1)])],
        [Access(0, stride=(100, 1)), Access(1, stride=(1,))],
        {0: (0, 1)},
    )
    b.tasks(b.op("ROWS", "sum", (1,), (1,), slots, {"MAIN": [code]}))
    y = np.zeros(1, np.float32)
    _ext.run(b.blob(), [x], [y], isa=isa)
    assert y[0] == np.float32(fixed_order("SUM", x[0, :30]) + fixed_order("SUM", x[0, 30:]))


@pytest.mark.parametrize("isa", ISAS)
def test_gather_scatter_and_conditions(isa: str) -> None:
    """Dynamic coordinates clamp, conditional stores skip, additive stores meet in index order."""
    n, m = 300, 50
    x = RNG.standard_normal(m).astype(np.float32)
    i = RNG.integers(-20, m + 20, n).astype(np.int32)
    b = Builder()
    slots = [b.arg(4 * m), b.arg(4 * n), b.result(4 * n), b.result(4 * m), b.result(4 * m)]
    body = [
        instr("LOAD", V, aux=1),
        instr("LOAD", V + 1, aux=0),
        instr("STORE", a=V + 1, aux=2),
        instr("CONST", V + 2, imm=0),
        instr("I_LT", V + 3, V, V + 2),
        instr("B_NOT", V + 3, V + 3),
        instr("STORE_ADD", a=V + 1, b=V + 3, aux=3),
        instr("STORE_IF", a=V + 1, b=V + 3, aux=4),
    ]
    dyn = ((V, m - 1, 1),)
    accesses = [
        Access(0, dyn=dyn),
        Access(1, "I32", (1,)),
        Access(2, stride=(1,)),
        Access(3, dyn=dyn),
        Access(4, dyn=dyn),
    ]
    b.tasks(
        b.op("ROWS", "gather", (n,), (n,), slots, {"MAIN": [Code([Stage("VECTOR", body)], accesses, {0: (0, n)}, 0)]})
    )
    out, total, last = np.zeros(n, np.float32), np.zeros(m, np.float32), np.zeros(m, np.float32)
    _ext.run(b.blob(), [x, i], [out, total, last], isa=isa)
    at = np.clip(i, 0, m - 1)
    np.testing.assert_array_equal(out, x[at])
    want = np.zeros(m, np.float32)
    np.add.at(want, at[i >= 0], x[at[i >= 0]])
    np.testing.assert_array_equal(total, want)
    np.testing.assert_array_equal(last, np.where(np.isin(np.arange(m), at[i >= 0]), x, 0))


@pytest.mark.parametrize("isa", ISAS)
def test_index_boxes_and_outer_loops(isa: str) -> None:
    """A concatenation of two codes over a tiled two-dimensional range, each with an index of its own."""
    b = Builder()
    out = b.result(4 * 7 * 300, "I32")

    def part(lo: int, hi: int, imm: int) -> Code:
        body = [instr("INDEX", V, aux=0, imm=imm), instr("STORE", a=V, aux=1)]
        return Code(
            [Stage("VECTOR", body)],
            [Access(0, stride=(1000, 3)), Access(0, "I32", (300, 1))],
            {0: (0, 7), 1: (lo, hi)},
            1,
        )

    b.tasks(b.op("ROWS", "iota", (7, 300), (2, 45), [out], {"MAIN": [part(0, 123, 5), part(123, 300, -5)]}))
    y = np.zeros((7, 300), np.int32)
    _ext.run(b.blob(), [], [y], poison=True, isa=isa)
    i, j = np.indices(y.shape)
    np.testing.assert_array_equal(y, 1000 * i + 3 * j + np.where(j < 123, 5, -5))


def test_same_bits_whatever_the_strip() -> None:
    """Element-wise results do not depend on where a strip or a task begins."""
    x = floats(-20, 20, 1000)
    for op in ("F_EXP", "F_TANH", "F_SIN", "F_ERF", "F_LOG1P"):
        whole = apply(op, "", x)
        for at in (1, 7, 300):
            assert apply(op, "", x[at:]).tobytes() == whole[at:].tobytes()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads and writes MXCSR")
def test_the_callers_floating_point_mode_neither_matters_nor_changes() -> None:
    """XLA's threads flush denormals: a launch from one of them gives the bits of any other."""
    libm, found, flushing = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    assert libm.fegetenv(found) == 0
    flushing[:] = found[:]
    flushing[7] |= 0x8040  # the last word of glibc's fenv_t is MXCSR; FTZ and DAZ
    x, y = np.array([1e-40, -3e-39, 1.0], np.float32), np.array([2.0, 0.5, 1e-42], np.float32)
    try:
        assert libm.fesetenv(flushing) == 0
        have = apply("F_MUL", "plain", x, y)
        after = (ctypes.c_uint32 * 8)()
        libm.fegetenv(after)
    finally:
        libm.fesetenv(found)
    assert after[7] & 0x8040 == 0x8040
    np.testing.assert_array_equal(have, x * y)
    assert np.all(have != 0)
