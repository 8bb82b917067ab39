"""Changes of element type. Widening a float costs nothing; narrowing is a rounding."""

from __future__ import annotations

import numpy as np

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.registry import primitive
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr
from jax_mpk.ir.graph import compute_dtype, itemsize
from jax_mpk.ir.interpret import NUMPY_DTYPES

_RANGE = {"i8": (-128, 127), "i16": (-32768, 32767), "u8": (0, 255), "u16": (0, 65535)}


def converted(e: Expr, old: str, new: str) -> Expr:
    """An element of dtype `old` as one of dtype `new`, as XLA converts it (floats to integers saturate)."""
    have, want = compute_dtype(old), compute_dtype(new)
    if old == new:
        return e
    if isinstance(e, E.Const) and old in ("bool", "i32", "f32") and want == "f32":
        return E.const(np.asarray(e.value, NUMPY_DTYPES[old]).astype(NUMPY_DTYPES[new]).item(), "f32")
    if want == "bool":
        return E.unary("f2b" if have == "f32" else "i2b", e)
    if have == "bool":
        return E.select(e, E.const(1, want), E.const(0, want))
    if want == "f32":
        wide = e if have == "f32" else E.unary("i2f" if have == "i32" else "u2f", e)
        return wide if new == "f32" or (have == "f32" and itemsize(old) < 2) else rounded(wide, new)
    if have == "f32":
        if new in _RANGE:
            low, high = _RANGE[new]
            e = E.binary("min", E.binary("max", e, E.const(low, "f32")), E.const(high, "f32"))
        return E.unary("f2i" if want == "i32" else "f2u", e)
    if itemsize(new) < 4 and not (old[0] == new[0] and itemsize(old) <= itemsize(new)):
        e = rounded(e, new)
    return e if have == want else E.unary("i2u" if want == "u32" else "u2i", e)


@primitive("convert_element_type")
def _convert(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    if x.dtype == eqn.dtype:
        return x
    return b.map(eqn.shape, eqn.dtype, converted(x.over(eqn.shape), x.dtype, eqn.dtype))


# ----------------------------------------------------------------------------------------------------------------- bits


def _bits(n: int) -> Expr:
    return E.const(n, "u32")


def _and(e: Expr, mask: int) -> Expr:
    return E.binary("and", e, _bits(mask))


def _shifted(op: str, e: Expr, by: int) -> Expr:
    return E.binary(op, e, _bits(by)) if by else e


def bits_of(e: Expr, dtype: str) -> Expr:
    """The bits in memory of an element, a u32 (those beyond the width are zero)."""
    if e.dtype == "f32":
        word = E.unary("i2u", E.unary("bitcast_f2i", e))
        if dtype != "f16":
            return _shifted("shr", word, 16 if dtype == "bf16" else 0)  # a bf16 is the upper half of what it widens to
        size, top = _and(word, 0x7FFFFFFF), _shifted("shr", word, 13)
        normal = E.binary("sub", _and(top, 0x3FFFF), _bits((127 - 15) << 10))
        tiny = E.unary("f2u", E.binary("mul", E.unary("abs", e), E.const(2.0**24, "f32")))
        special = E.binary("or", _and(top, 0x3FF), _bits(0x7C00))
        out = E.select(E.binary("lt", size, _bits((127 - 14) << 23)), tiny, normal)
        out = E.select(E.binary("le", _bits(0x7F800000), size), special, out)
        return E.binary("or", out, _and(_shifted("shr", word, 16), 0x8000))
    e = converted(e, "bool", "u32") if e.dtype == "bool" else E.unary("i2u", e) if e.dtype == "i32" else e
    return e if itemsize(dtype) == 4 or e.dtype == "bool" else _and(e, (1 << 8 * itemsize(dtype)) - 1)


def of_bits(e: Expr, dtype: str) -> Expr:
    """The element of a numeric `dtype` with these bits, the inverse of `bits_of`."""
    if compute_dtype(dtype) != "f32":
        return e if dtype[0] == "u" else rounded(E.unary("u2i", e), dtype)
    if dtype == "f16":
        sign, size = _shifted("shl", _and(e, 0x8000), 16), _and(e, 0x7FFF)
        wide = _shifted("shl", size, 13)
        tiny = E.unary("i2u", E.unary("bitcast_f2i", E.binary("mul", E.unary("u2f", size), E.const(2.0**-24, "f32"))))
        out = E.select(E.binary("lt", size, _bits(0x400)), tiny, E.binary("add", wide, _bits((127 - 15) << 23)))
        out = E.select(E.binary("le", _bits(0x7C00), size), E.binary("or", wide, _bits(0x7F800000)), out)
        e = E.binary("or", out, sign)
    else:
        e = _shifted("shl", e, 16 if dtype == "bf16" else 0)
    return E.unary("bitcast_i2f", E.unary("u2i", e))


@primitive("bitcast_convert_type")
def _bitcast(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    """Between types of one width; a wider element is a row of narrower ones (the last dimension), the lowest first."""
    old, new = x.dtype, eqn.dtype
    if old == new:
        return x
    if new == "bool":
        b.unsupported(f"from {old} to {new}")
    have, want = itemsize(old), itemsize(new)
    axes = identity(eqn.shape)
    if have == want:
        return b.map(eqn.shape, new, of_bits(bits_of(x.at(axes), old), new))
    if have > want:
        shift = E.unary("i2u", E.index(E.coord_scale(axes[-1], 8 * want)))
        part = E.binary("shr", bits_of(x.at(axes[:-1]), old), shift)
        return b.map(eqn.shape, new, of_bits(_and(part, (1 << 8 * want) - 1), new))
    whole = bits_of(x.at((*axes, E.coord_const(0))), old)
    for n in range(1, want // have):
        part = bits_of(x.at((*axes, E.coord_const(n))), old)
        whole = E.binary("or", whole, _shifted("shl", part, 8 * have * n))
    return b.map(eqn.shape, new, of_bits(whole, new))


@primitive("nextafter")
def _nextafter(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
    """The neighbour of `x` towards `y`: one more or less in the bits of its magnitude."""
    e, to, dtype = x.over(eqn.shape), y.over(eqn.shape), x.dtype
    zero, top = E.const(0.0, "f32"), _bits(1 << (8 * itemsize(dtype) - 1))
    bits = bits_of(e, dtype)
    away = E.binary("eq", E.binary("lt", e, to), E.binary("lt", zero, e))
    step = E.binary("add", bits, E.select(away, _bits(1), _bits(0xFFFFFFFF)))
    first = E.binary("or", _bits(1), E.binary("and", bits_of(to, dtype), top))
    out = of_bits(E.select(E.binary("eq", e, zero), first, step), dtype)
    same = E.binary("or", E.binary("eq", e, to), E.binary("ne", to, to))
    out = E.select(same, to, E.select(E.binary("ne", e, e), e, out))
    return b.map(eqn.shape, eqn.dtype, out)


@primitive("reduce_precision")
def _reduce_precision(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    kind = (eqn.params["exponent_bits"], eqn.params["mantissa_bits"])
    own = {"f32": (8, 23), "bf16": (8, 7), "f16": (5, 10)}[x.dtype]
    if kind == own:
        return x
    if kind not in ((8, 7), (5, 10)):
        b.unsupported(f"only the precisions of bfloat16 and float16 are, not {kind}")
    op = "round_bf16" if kind == (8, 7) else "round_f16"
    return b.map(eqn.shape, eqn.dtype, rounded(E.unary(op, x.over(eqn.shape)), eqn.dtype))
