"""The operations of expressions, on NumPy arrays of float32, int32, uint32 and bool: what backends must compute."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from scipy.special import erf

_Op1 = Callable[[np.ndarray], np.ndarray]
_Op2 = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _saturate(dtype: type) -> _Op1:
    """Float to integer: truncated, saturated, NaN gives 0."""
    info = np.iinfo(dtype)

    def op(x: np.ndarray) -> np.ndarray:
        return np.clip(np.nan_to_num(x.astype(np.float64), nan=0.0), info.min, info.max).astype(np.int64).astype(dtype)

    return op


def _through(dtype: type) -> _Op1:
    return lambda x: x.astype(dtype).astype(x.dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)


_UNARY: dict[str, _Op1] = {
    "neg": np.negative, "abs": np.abs, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log,
    "log1p": np.log1p, "sqrt": np.sqrt, "rsqrt": lambda x: np.float32(1) / np.sqrt(x), "cbrt": np.cbrt,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "tan": np.tan, "erf": erf, "sign": np.sign, "floor": np.floor,
    "logistic": lambda x: np.float32(1) / (np.float32(1) + np.exp(-x)), "ceil": np.ceil, "round_even": np.rint,
    "round_away": lambda x: np.copysign(np.floor(np.abs(x.astype(np.float64)) + 0.5), x).astype(np.float32),
    "not": np.invert, "is_finite": np.isfinite, "round_bf16": _through(ml_dtypes.bfloat16),
    "round_f16": _through(np.float16), "f2i": _saturate(np.int32), "f2u": _saturate(np.uint32),
    "i2f": lambda x: x.astype(np.float32), "u2f": lambda x: x.astype(np.float32),
    "i2u": lambda x: x.astype(np.uint32), "u2i": lambda x: x.astype(np.int32),
    "bitcast_i2f": lambda x: _bits(x).view(np.float32), "bitcast_f2i": lambda x: _bits(x).view(np.int32),
    "wrap_i8": _through(np.int8), "wrap_u8": _through(np.uint8), "wrap_i16": _through(np.int16),
    "wrap_u16": _through(np.uint16), "i2b": lambda x: x != 0, "f2b": lambda x: x != 0,
    "popcount": lambda x: np.bitwise_count(_bits(x)).astype(x.dtype),
    "clz": lambda x: (32 - np.frexp(_bits(x).astype(np.float64))[1]).astype(x.dtype),
}  # fmt: skip


def unary(op: str, x: np.ndarray) -> np.ndarray:
    """`Unary(op)` of an array, in the type that `jax_mpk.ir.expr` gives it."""
    return _UNARY[op](x)


def _div(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out: np.ndarray
    if x.dtype == np.float32:
        out = x / y
        return out
    a, b = x.astype(np.int64), y.astype(np.int64)
    q = np.abs(a) // np.maximum(np.abs(b), 1) * np.where((a < 0) != (b < 0), -1, 1)
    return np.where(b == 0, -1, q).astype(x.dtype)


def _rem(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out: np.ndarray
    if x.dtype == np.float32:
        out = np.fmod(x, y)
        return out
    a, b = x.astype(np.int64), y.astype(np.int64)
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b))).astype(x.dtype)


def _pow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out: np.ndarray
    if x.dtype == np.float32:
        out = np.power(x, y.astype(np.float32))
        return out
    return np.where(y < 0, 0, np.power(x, np.maximum(y, 0))).astype(x.dtype)


def _shift(f: Callable[[np.ndarray, np.ndarray], np.ndarray], kind: type, beyond: int | None) -> _Op2:
    """A shift of the bits seen as `kind`, by an unsigned amount; by 32 or more it gives 0 (None: the sign)."""

    def op(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        amount = _bits(y).astype(np.int64)
        wide = _bits(x).view(kind).astype(np.int64)
        out = f(wide, np.minimum(amount, 31))
        return np.where((amount > 31) & (beyond is not None), 0, out).astype(x.dtype)

    return op


def _extreme(f: np.ufunc, zeros: np.ufunc) -> _Op2:
    """`maximum` or `minimum` of IEEE 754-2019: of two zeros the sign decides (`zeros` combines their bits)."""

    def op(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        out: np.ndarray = f(x, y)
        if out.dtype != np.float32:
            return out
        x, y = np.broadcast_arrays(x, y)
        out = np.where((x == 0) & (y == 0), zeros(_bits(x), _bits(y)).view(np.float32), out)
        return out

    return op


maximum, minimum = _extreme(np.maximum, np.bitwise_and), _extreme(np.minimum, np.bitwise_or)


_BINARY: dict[str, _Op2] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _div, "rem": _rem, "max": maximum, "min": minimum,
    "pow": _pow, "atan2": np.arctan2, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": _shift(np.left_shift, np.uint32, 0), "shr": _shift(np.right_shift, np.uint32, 0),
    "sar": _shift(np.right_shift, np.int32, None), "lt": np.less, "le": np.less_equal, "eq": np.equal,
    "ne": np.not_equal,
}  # fmt: skip


def binary(op: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`Binary(op)` of two arrays that broadcast."""
    return _BINARY[op](x, y)


_SCAN: dict[str, _Op2] = {"sum": np.add, "prod": np.multiply, "max": maximum, "min": minimum, "logsumexp": np.logaddexp}


def combine(op: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two elements of a scan combined, `x` the one before `y`."""
    return _SCAN[op](x, y)


def scan(op: str, x: np.ndarray) -> np.ndarray:
    """Every element of the last dimension combined with all before it, in log2 steps."""
    step = 1
    while step < x.shape[-1]:
        x = np.concatenate([x[..., :step], combine(op, x[..., :-step], x[..., step:])], -1)
        step *= 2
    return x + np.asarray(0, x.dtype) if op == "sum" else x  # sums start from +0


def reduce(op: str, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """`Reduce(op)` over dimensions, which keep an extent of 1."""
    out: np.ndarray
    if op in ("argmax", "argmin"):
        out = getattr(np, op)(x, axis=axes[0], keepdims=True).astype(np.int32)
        return out
    f = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and,
         "or": np.bitwise_or}[op]  # fmt: skip
    out = f.reduce(x, axis=axes, keepdims=True, dtype=x.dtype)
    if op in ("max", "min") and x.dtype == np.float32:  # one zero of the greater (smaller) sign decides
        found = ((x == 0) & (np.signbit(x) == (op == "min"))).any(axis=axes, keepdims=True)
        out = np.where(out == 0, np.where(found == (op == "max"), np.float32(0.0), np.float32(-0.0)), out)
    return out
