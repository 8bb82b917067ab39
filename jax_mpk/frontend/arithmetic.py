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


@primitive("atan", "sinh", "cosh", "asinh", "acosh", "atanh", "asin", "acos")
def _derived(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    """Functions written by others; each form keeps its relative accuracy near zero."""
    u, v, one, half, two = E.unary, E.binary, E.const(1.0, "f32"), E.const(0.5, "f32"), E.const(2.0, "f32")
    e = x.over(eqn.shape)

    def root(s: Expr, t: Expr) -> Expr:  # sqrt((1 - e) * (1 + e)) and its like
        return u("sqrt", v("mul", s, t))

    match eqn.primitive:
        case "atan":
            out = v("atan2", e, one)
        case "asin":
            out = v("atan2", e, root(v("sub", one, e), v("add", one, e)))
        case "acos":
            out = v("atan2", root(v("sub", one, e), v("add", one, e)), e)
        case "sinh":  # with m = expm1(|x|): (m + m / (m + 1)) / 2
            m = u("expm1", u("abs", e))
            out = v("mul", v("mul", half, v("add", m, v("div", m, v("add", m, one)))), u("sign", e))
            out = E.select(v("lt", E.const(80.0, "f32"), u("abs", e)),
                           v("mul", u("sign", e), v("mul", half, u("exp", u("abs", e)))), out)  # fmt: skip
        case "cosh":
            p = u("exp", v("sub", u("abs", e), u("log", two)))
            out = v("add", p, v("div", v("mul", half, half), p))
        case "asinh":  # log1p(a + a^2 / (1 + sqrt(a^2 + 1)))
            a = u("abs", e)
            root1 = v("add", one, u("sqrt", v("add", v("mul", a, a), one)))
            small = u("log1p", v("add", a, v("div", v("mul", a, a), root1)))
            big = v("add", u("log", a), u("log", two))
            out = v("mul", u("sign", e), E.select(v("lt", E.const(1e9, "f32"), a), big, small))
        case "acosh":
            d = v("sub", e, one)
            small = u("log1p", v("add", d, v("mul", u("sqrt", d), u("sqrt", v("add", e, one)))))
            out = E.select(v("lt", E.const(1e9, "f32"), e), v("add", u("log", e), u("log", two)), small)
        case _:  # atanh
            out = v("mul", half, v("sub", u("log1p", e), u("log1p", u("neg", e))))
    return b.map(eqn.shape, eqn.dtype, rounded(out, eqn.dtype))


_ERFC = (
    -1.26551213, 1.00000108, 0.374954545, 0.0840174752, -0.0903060592, -0.135904543, -0.042822709, -0.29466216,
    0.939903597, -0.794999438, 0.225497517,
)  # fmt: skip
"""log(erfc(x) / t) + x*x as a polynomial in t = 1 / (1 + x/2), fitted for x >= 0.5."""


@primitive("erfc")
def _erfc(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    """`1 - erf` near zero, elsewhere a fit that keeps the relative accuracy of the tail."""
    u, v, one = E.unary, E.binary, E.const(1.0, "f32")
    e = x.over(eqn.shape)
    a = u("abs", e)
    t = v("div", one, v("add", one, v("mul", E.const(0.5, "f32"), a)))
    p = E.const(_ERFC[-1], "f32")
    for c in _ERFC[-2::-1]:
        p = v("add", v("mul", p, t), E.const(c, "f32"))
    tail = v("mul", t, u("exp", v("sub", p, v("mul", a, a))))
    tail = E.select(v("lt", e, E.const(0.0, "f32")), v("sub", E.const(2.0, "f32"), tail), tail)
    out = E.select(v("lt", a, E.const(0.5, "f32")), v("sub", one, u("erf", e)), tail)
    return b.map(eqn.shape, eqn.dtype, rounded(out, eqn.dtype))


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
