"""Which instruction computes an expression node. Registers are untyped: casts that keep the bits are no instruction."""

from __future__ import annotations

from jax_mpk.ir.expr import Binary, Expr, Unary

_SAME_BITS = frozenset(("bitcast_i2f", "bitcast_f2i", "i2u", "u2i"))
_FIXED = {
    "f2i": "F_TO_I", "f2u": "F_TO_U", "i2f": "I_TO_F", "u2f": "U_TO_F", "i2b": "I_TO_B", "f2b": "F_TO_B",
    "is_finite": "F_IS_FINITE", "round_bf16": "F_ROUND_BF16", "round_f16": "F_ROUND_F16", "wrap_i8": "I_WRAP_I8",
    "wrap_u8": "I_WRAP_U8", "wrap_i16": "I_WRAP_I16", "wrap_u16": "I_WRAP_U16", "popcount": "I_POPCOUNT",
    "clz": "I_CLZ",
}  # fmt: skip
_SIGNED = frozenset(("div", "rem", "max", "min", "lt", "le"))
"""Integer operations that differ between i32 and u32; booleans are 0 or 1, where both agree."""


def alias(e: Expr) -> Expr:
    """The node that computes the same 32 bits as `e`, below casts that change nothing."""
    while isinstance(e, Unary) and (e.op in _SAME_BITS or (e.op == "abs" and e.a.dtype in ("u32", "bool"))
                                    or (e.op == "i2b" and e.a.dtype == "bool")):  # fmt: skip
        e = e.a
    return e


def opcode(e: Unary | Binary) -> str:
    """The name of the instruction for one operation."""
    dtype = e.a.dtype
    if isinstance(e, Unary):
        if e.op in _FIXED:
            return "U_TO_F" if e.op == "i2f" and dtype == "u32" else _FIXED[e.op]
        if e.op == "not":
            return "B_NOT" if dtype == "bool" else "I_NOT"
        if e.op == "sign" and dtype in ("u32", "bool"):
            return "I_TO_B"  # one unless zero
        return ("F_" if dtype == "f32" else "I_") + e.op.upper()
    if e.op == "pow" and dtype == "f32":
        return "F_POW" if e.b.dtype == "f32" else "F_POW_I"
    if dtype == "f32":
        return "F_" + e.op.upper()
    return ("U_" if dtype == "u32" and e.op in _SIGNED else "I_") + e.op.upper()
