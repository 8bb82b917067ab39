"""Element-wise arithmetic, comparisons, logic and selection."""

from __future__ import annotations

from collections.abc import Callable

from jax_mpk.frontend.builder import Builder, Equation, Tensor, as_i32, rounded
from jax_mpk.frontend.registry import Rule, primitive, rules
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr


def elementwise(f: Callable[[Equation, list[Expr]], Expr], *, exact: bool = False) -> Rule:
    """A rule that computes each element by `f(eqn, operands)`; `exact` results need no rounding."""

    def rule(b: Builder, eqn: Equation, *xs: Tensor) -> Tensor:
        e = f(eqn, [x.over(eqn.shape) for x in xs])
        return b.map(eqn.shape, eqn.dtype, e if exact else rounded(e, eqn.dtype))

    return rule


# -------------------------------------------------------------------------------------------------------------- tables

_UNARY = {
    "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log1p": "log1p", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "cbrt": "cbrt", "tanh": "tanh", "sin": "sin", "cos": "cos", "tan": "tan", "logistic": "logistic", "erf": "erf",
    "floor": "floor", "ceil": "ceil", "neg": "neg",
}  # fmt: skip
_BINARY = {"sub": "sub", "div": "div", "rem": "rem", "atan2": "atan2"}
_LATTICE = {"max": ("max", "or"), "min": ("min", "and"), "add": ("add", "or"), "add_any": ("add", "or"),
            "mul": ("mul", "and")}  # fmt: skip
_COMPARE = {"eq": ("eq", False), "ne": ("ne", False), "lt": ("lt", False), "le": ("le", False), "gt": ("lt", True),
            "ge": ("le", True)}  # fmt: skip
_NEUTRAL = {"add": 0, "mul": 1, "add_any": 0}


def _binary(name: str, integers: str, booleans: str) -> Rule:
    """Booleans form the lattice of and/or, as in XLA. Neutral constants of exact operations disappear."""

    def rule(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
        if eqn.dtype == "bool":
            return b.map(eqn.shape, "bool", E.binary(booleans, x.over(eqn.shape), y.over(eqn.shape)))
        for one, other in ((x, y), (y, x)):
            exact = name == "mul" or eqn.dtype[0] in "iu"  # x * 1.0 is x, but -0.0 + 0.0 is not -0.0
            neutral = isinstance(one.splat, E.Const) and one.splat.value == _NEUTRAL.get(name)
            if neutral and exact and other.shape == eqn.shape:
                return other
        e = E.binary(integers, x.over(eqn.shape), y.over(eqn.shape))
        return b.map(eqn.shape, eqn.dtype, e if integers in ("max", "min") else rounded(e, eqn.dtype))

    return rule


rules(_UNARY, lambda op: elementwise(lambda _, a: E.unary(op, a[0])))
rules(_BINARY, lambda op: elementwise(lambda _, a: E.binary(op, *a)))
rules({k: (k, *v) for k, v in _LATTICE.items()}, lambda v: _binary(*v))
rules(_COMPARE, lambda v: elementwise(lambda _, a: E.binary(v[0], *(a[::-1] if v[1] else a)), exact=True))
rules({k: k for k in ("and", "or", "xor")}, lambda op: elementwise(lambda _, a: E.binary(op, *a), exact=True))
rules({"is_finite": "is_finite"}, lambda op: elementwise(lambda _, a: E.unary(op, a[0]), exact=True))


# ------------------------------------------------------------------------------------------------- one function a rule


@primitive("not")
def _not(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return b.map(eqn.shape, eqn.dtype, rounded(E.unary("not", x.over(eqn.shape)), eqn.dtype))


@primitive("abs", "sign")
def _abs_sign(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return b.map(eqn.shape, eqn.dtype, rounded(E.unary(eqn.primitive, x.over(eqn.shape)), eqn.dtype))


@primitive("round")
def _round(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    even = "EVEN" in getattr(eqn.params["rounding_method"], "name", str(eqn.params["rounding_method"])).upper()
    op = "round_even" if even else "round_away"
    return b.map(eqn.shape, eqn.dtype, rounded(E.unary(op, x.over(eqn.shape)), eqn.dtype))


@primitive("square")
def _square(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    e = x.over(eqn.shape)
    return b.map(eqn.shape, eqn.dtype, rounded(E.binary("mul", e, e), eqn.dtype))


@primitive("one_minus_square")
def _one_minus_square(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    """In the derivative of tanh, since JAX 0.12."""
    e, one = x.over(eqn.shape), E.const(1, x.compute)
    product = E.binary("mul", E.binary("add", one, e), E.binary("sub", one, e))
    return b.map(eqn.shape, eqn.dtype, rounded(product, eqn.dtype))


@primitive("integer_pow")
def _integer_pow(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    """Repeated multiplication, one rounding at the end."""
    base, n = x.over(eqn.shape), eqn.params["y"]
    if n < 0 and eqn.dtype[0] in "iu":
        b.unsupported("a negative power of an integer")
    out: Expr | None = None
    left = abs(n)
    while left:
        if left & 1:
            out = base if out is None else E.binary("mul", out, base)
        left >>= 1
        if left:
            base = E.binary("mul", base, base)
    one = E.const(1, x.compute)
    out = one if out is None else E.binary("div", one, out) if n < 0 else out
    return b.map(eqn.shape, eqn.dtype, rounded(out, eqn.dtype))


@primitive("pow")
def _pow(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
    """Floats to a float or integer power."""
    base, power = x.over(eqn.shape), y.over(eqn.shape)
    if y.compute == "f32" or x.compute != "f32":
        e = E.binary("pow", base, power)
    else:
        e = E.binary("pow", base, as_i32(power))
    return b.map(eqn.shape, eqn.dtype, rounded(e, eqn.dtype))


def total_order(e: Expr) -> Expr:
    """An f32 as the i32 that comes before and after the same ones: -NaN, -inf, ..., -0, 0, ..., inf, NaN."""
    bits = E.unary("bitcast_f2i", e)
    magnitude = E.binary("and", E.binary("sar", bits, E.const(31, "i32")), E.const(2**31 - 1, "i32"))
    return E.binary("xor", bits, magnitude)


@primitive("eq_to", "lt_to", "le_to")
def _total_order(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
    p, q = (total_order(e) if e.dtype == "f32" else e for e in (x.over(eqn.shape), y.over(eqn.shape)))
    return b.map(eqn.shape, "bool", E.binary(eqn.primitive[:2], p, q))


@primitive("clamp")
def _clamp(b: Builder, eqn: Equation, low: Tensor, x: Tensor, high: Tensor) -> Tensor:
    lo, e, hi = (t.over(eqn.shape) for t in (low, x, high))
    return b.map(eqn.shape, eqn.dtype, E.binary("min", E.binary("max", e, lo), hi))


@primitive("select_n", moves=True)
def _select_n(b: Builder, eqn: Equation, which: Tensor, *cases: Tensor) -> Tensor:
    w = which.over(eqn.shape)
    return b.map(eqn.shape, eqn.dtype, choose(w, [c.over(eqn.shape) for c in cases]))


def choose(which: Expr, cases: list[Expr]) -> Expr:
    """`cases[which]`; `which` is boolean (two cases, false first) or an integer, clamped to the cases there are."""
    if which.dtype == "bool":
        return E.select(which, cases[1], cases[0]) if len(cases) == 2 else cases[0]
    out = cases[-1]
    for n in range(len(cases) - 2, -1, -1):
        out = E.select(E.binary("le", as_i32(which), E.const(n, "i32")), cases[n], out)
    return out


@primitive("shift_left", "shift_right_logical", "shift_right_arithmetic")
def _shift(b: Builder, eqn: Equation, x: Tensor, y: Tensor) -> Tensor:
    """Shifts by the width or more give 0 (arithmetic ones: the sign), at every width."""
    e, n = x.over(eqn.shape), y.over(eqn.shape)
    bits = int(eqn.dtype[1:])
    if bits < 32:  # a narrow amount may be negative (i8) and a narrow operand sign-extended: look at the low bits only
        mask = E.const((1 << bits) - 1, x.compute)
        n = E.binary("and", n, mask)
        e = E.binary("and", e, mask) if eqn.primitive == "shift_right_logical" else e
    op = {"shift_left": "shl", "shift_right_logical": "shr"}.get(eqn.primitive, "sar")
    if op == "sar" and eqn.dtype[0] == "u":  # the sign is the top bit of the width
        e = E.unary("u2i", E.unary(f"wrap_i{bits}", e) if bits < 32 else e)
        out = E.unary("i2u", E.binary("sar", e, E.unary("u2i", n)))
    else:
        out = E.binary(op, e, n)
    return b.map(eqn.shape, eqn.dtype, rounded(out, eqn.dtype))


@primitive("clz", "population_count")
def _count_bits(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    bits = int(eqn.dtype[1:])
    e = x.over(eqn.shape)
    e = E.binary("and", e, E.const((1 << bits) - 1, x.compute)) if bits < 32 else e
    if eqn.primitive == "clz":
        out = E.binary("sub", E.unary("clz", e), E.const(32 - bits, x.compute)) if bits < 32 else E.unary("clz", e)
    else:
        out = E.unary("popcount", e)
    return b.map(eqn.shape, eqn.dtype, out)
