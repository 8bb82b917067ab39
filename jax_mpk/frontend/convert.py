"""Changes of element type. Widening a float costs nothing; narrowing is a rounding."""

from __future__ import annotations

import numpy as np

from jax_mpk.frontend.builder import Builder, Equation, Tensor, rounded
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


@primitive("bitcast_convert_type")
def _bitcast(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    """Between types of one width. The bits of a bf16 are the upper half of the f32 that it widens to."""
    old, new = x.dtype, eqn.dtype
    if old == new:
        return x
    if itemsize(old) != itemsize(new) or "f16" in (old, new) or "bool" in (old, new):
        b.unsupported(f"from {old} to {new}")
    e = x.over(eqn.shape)
    if x.compute == "f32":
        e = E.unary("bitcast_f2i", e)
        e = E.binary("sar", e, E.const(16, "i32")) if old == "bf16" else e
        have = "i32" if old == "f32" else "i16"
        return b.map(eqn.shape, new, converted(e, have, new))
    if eqn.dtype in ("f32", "bf16"):
        e = E.unary("u2i", e) if e.dtype == "u32" else e
        e = E.binary("shl", e, E.const(16, "i32")) if new == "bf16" else e
        return b.map(eqn.shape, new, E.unary("bitcast_i2f", e))
    return b.map(eqn.shape, new, converted(e, old, new))


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
