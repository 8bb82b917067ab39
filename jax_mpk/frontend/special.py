"""Functions of floats that no instruction computes, written by those that there are.

All compute in float32 and are within a few units in the last place of it, also where they are near zero; the tests say
how many, against float64. The coefficients are least-squares fits with weights (towards the least relative error).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_mpk.frontend.arithmetic import elementwise
from jax_mpk.frontend.registry import rules
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr


def _f(x: float) -> Expr:
    return E.const(x, "f32")


def _add(x: Expr, y: Expr) -> Expr:
    return E.binary("add", x, y)


def _sub(x: Expr, y: Expr) -> Expr:
    return E.binary("sub", x, y)


def _mul(x: Expr, y: Expr) -> Expr:
    return E.binary("mul", x, y)


def _div(x: Expr, y: Expr) -> Expr:
    return E.binary("div", x, y)


def _less(x: Expr, y: float) -> Expr:
    return E.binary("lt", x, _f(y))


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """The polynomial with these coefficients, that of the constant first."""
    out = _f(coefficients[-1])
    for c in coefficients[-2::-1]:
        out = _add(_mul(out, x), _f(c))
    return out


_ONE, _HALF, _ZERO, _LN2 = _f(1.0), _f(0.5), _f(0.0), _f(math.log(2))


# ------------------------------------------------------------------------------------- trigonometric and hyperbolic


def _cosine_side(x: Expr) -> Expr:
    """sqrt(1 - x^2)"""
    return E.unary("sqrt", _mul(_sub(_ONE, x), _add(_ONE, x)))


def _sinh(x: Expr) -> Expr:
    """With m = expm1(|x|): (m + m / (m + 1)) / 2."""
    a, sign = E.unary("abs", x), E.unary("sign", x)
    m = E.unary("expm1", a)
    small = _mul(_mul(_HALF, _add(m, _div(m, _add(m, _ONE)))), sign)
    return E.select(_less(a, 80.0), small, _mul(sign, _half_exp(a)))


def _half_exp(a: Expr) -> Expr:
    """exp(a) / 2, which is finite for a little longer than exp(a)."""
    root = E.unary("exp", _mul(_HALF, a))
    return _mul(_mul(_HALF, root), root)


def _cosh(x: Expr) -> Expr:
    half = _half_exp(E.unary("abs", x))
    return _add(half, _div(_f(0.25), half))


def _asinh(x: Expr) -> Expr:
    """log1p(a + a^2 / (1 + sqrt(a^2 + 1)))"""
    a = E.unary("abs", x)
    square = _mul(a, a)
    small = E.unary("log1p", _add(a, _div(square, _add(_ONE, E.unary("sqrt", _add(square, _ONE))))))
    return _mul(E.unary("sign", x), E.select(_less(a, 1e9), small, _add(E.unary("log", a), _LN2)))


def _acosh(x: Expr) -> Expr:
    d = _sub(x, _ONE)
    small = E.unary("log1p", _add(d, _mul(E.unary("sqrt", d), E.unary("sqrt", _add(x, _ONE)))))
    return E.select(_less(x, 1e9), small, _add(E.unary("log", x), _LN2))


def _atanh(x: Expr) -> Expr:
    return _mul(_HALF, _sub(E.unary("log1p", x), E.unary("log1p", E.unary("neg", x))))


# ------------------------------------------------------------------------------------------------- error functions

_ERFC = (
    -1.26551213, 1.00000108, 0.374954545, 0.0840174752, -0.0903060592, -0.135904543, -0.042822709, -0.29466216,
    0.939903597, -0.794999438, 0.225497517,
)  # fmt: skip
"""log(erfc(x) / t) + x*x as a polynomial in t = 1 / (1 + x/2), fitted for x >= 0.5."""


def _erfc(x: Expr) -> Expr:
    """`1 - erf` near zero, elsewhere a fit that keeps the relative accuracy of the tail.

    The square is that of the upper half of the bits, which is exact, and the rest.
    """
    a = E.binary("min", E.unary("abs", x), _f(16.0))  # where it is zero
    t = _div(_ONE, _add(_ONE, _mul(_HALF, a)))
    upper = E.unary("bitcast_i2f", E.binary("and", E.unary("bitcast_f2i", a), E.const(-(1 << 12), "i32")))
    rest = _sub(_polynomial(t, _ERFC), _mul(_sub(a, upper), _add(a, upper)))
    tail = _mul(_mul(t, E.unary("exp", E.unary("neg", _mul(upper, upper)))), E.unary("exp", rest))
    tail = E.select(_less(x, 0.0), _sub(_f(2.0), tail), tail)
    return E.select(_less(a, 0.5), _sub(_ONE, E.unary("erf", x)), tail)


_ERF_INV_CENTER = (0.886226926, 0.232013403, 0.12757255, 0.0861732278, 0.0690735131, 0.029487237, 0.0979727673)
"""erf_inv(x) / x in x^2, for |x| < 1/2."""
_ERF_INV_TAIL = (
    0.920839002, 0.0264487754, -0.00122070197, -0.00271605899, 0.000830183883, 0.000260556389, -0.000179339786,
    -2.53669792e-05, 3.33313131e-05, 2.43478913e-07, -3.71746622e-06, 2.89659788e-07, 1.17339896e-07,
)  # fmt: skip
"""erf_inv(|x|) / s in s - 2 with s = sqrt(-log(1 - x^2)), for |x| >= 1/2: s goes from 0.53 to 4."""


def _erf_inv(x: Expr) -> Expr:
    """1 - |x| is exact in the tail, so that s is too."""
    a = E.unary("abs", x)
    center = _mul(x, _polynomial(_mul(x, x), _ERF_INV_CENTER))
    s = E.unary("sqrt", E.unary("neg", E.unary("log", _mul(_sub(_ONE, a), _add(_ONE, a)))))
    tail = _mul(s, _polynomial(_sub(s, _f(2.0)), _ERF_INV_TAIL))
    tail = E.select(E.binary("eq", a, _ONE), _f(math.inf), tail)
    return E.select(_less(a, 0.5), center, _mul(E.unary("sign", x), tail))


# ------------------------------------------------------------------------------------------------- gamma functions

_LGAMMA = (
    0.450139311, -0.119481582, 0.0445205904, -0.0190541612, 0.00877346377, -0.0042233748, 0.00211688598, -0.00107713884,
    0.000475429862, -0.000236840325, 0.000247414282, -0.00013733506,
)  # fmt: skip
"""lgamma(1 + p) / (p * (p - 1)) in p - 0.75, for p in [0, 1.5]: both zeros are factors, so that they stay exact."""
_STIRLING = (0.0833333331, -0.00277769735, 0.000788492346, -0.000485593552)
"""x times the rest of Stirling's formula, in 1 / x^2, for x >= 3.5."""


def _lgamma(x: Expr) -> Expr:
    """log|gamma|; negative x by reflection: log(pi / |sin(pi*x)|) - lgamma(1 - x).

    Between -2 and the poles below, lgamma has further zeros; near those the error is small only beside the two terms.
    """
    a = E.unary("abs", x)
    negative = _less(x, 0.0)
    z = E.select(negative, _add(_ONE, a), x)
    low, down, high = _less(z, 1.5), E.binary("le", _f(2.5), z), E.binary("le", _f(3.5), z)
    p = _sub(z, E.select(low, _ZERO, E.select(down, _f(2.0), _ONE)))
    near = _mul(_mul(p, _sub(p, _ONE)), _polynomial(_sub(p, _f(0.75)), _LGAMMA))
    log = E.unary("log", E.select(E.binary("or", low, high), z, E.select(down, _sub(z, _ONE), _ONE)))
    near = E.select(low, _sub(near, log), _add(near, log))
    r = _div(_ONE, z)
    rest = _add(_f(0.5 * math.log(2 * math.pi) - 0.5), _mul(r, _polynomial(_mul(r, r), _STIRLING)))
    out = E.select(high, _add(_mul(_sub(z, _HALF), _sub(log, _ONE)), rest), near)
    sine = E.unary("abs", E.unary("sin", _mul(_f(math.pi), _fraction(a))))
    mirrored = _sub(E.unary("neg", E.unary("log", _mul(sine, _f(1 / math.pi)))), out)
    mirrored = E.select(E.binary("eq", sine, _ZERO), _f(math.inf), mirrored)
    out = E.select(negative, mirrored, out)
    return E.select(E.binary("eq", a, _f(math.inf)), a, out)


def _fraction(a: Expr) -> Expr:
    """The distance to the nearest integer, signed (exact)."""
    return _sub(a, E.unary("round_even", a))


_DIGAMMA = (
    0.951055876, -0.423627499, 0.240542616, -0.148398786, 0.0949820834, -0.0620570763, 0.0408793358, -0.0257810123,
    0.0169804172, -0.0163840934, 0.0111186396,
)  # fmt: skip
"""digamma(y) / (y - root) in y - 1.5, for y in [1, 2]."""
_ROOT = (1.46163212, 1.24381499e-08)
"""The positive zero of digamma, as a float32 and what is left of it."""
_DIGAMMA_FAR = (-0.0833333284, 0.0083318296, -0.00389558363, 0.00297868299)
"""(digamma(x) - log(x) + 1 / (2*x)) * x^2 in 1 / x^2, for x >= 3."""


def _digamma(x: Expr) -> Expr:
    """Negative x by reflection: digamma(1 - x) - pi / tan(pi*x). NaN at the poles and at minus infinity, as in XLA."""
    a = E.unary("abs", x)
    negative = _less(x, 0.0)
    z = E.select(negative, _add(_ONE, a), x)
    low, high = _less(z, 1.0), E.binary("le", _f(3.0), z)
    up = E.binary("le", _f(2.0), z)
    y = E.select(low, _add(z, _ONE), E.select(up, _sub(z, _ONE), z))
    r = _div(_ONE, E.select(low, E.unary("neg", z), E.select(high, z, E.select(up, _sub(z, _ONE), _f(math.inf)))))
    distance = _sub(_sub(y, _f(_ROOT[0])), _f(_ROOT[1]))
    near = _add(_mul(distance, _polynomial(_sub(y, _f(1.5)), _DIGAMMA)), r)
    square = _mul(r, r)
    far = _add(_sub(E.unary("log", z), _mul(_HALF, r)), _mul(square, _polynomial(square, _DIGAMMA_FAR)))
    out = E.select(high, far, near)
    mirrored = _add(out, _div(_f(math.pi), E.unary("tan", _mul(_f(math.pi), _fraction(a)))))
    pole = E.binary("and", E.binary("le", x, _ZERO), E.binary("eq", x, E.unary("floor", x)))
    return E.select(pole, _f(math.nan), E.select(negative, mirrored, out))


# ------------------------------------------------------------------------------------------------------ logarithms


def _log2(x: Expr) -> Expr:
    """The exponent, and the logarithm of a mantissa between 0.7 and 1.4: powers of two are exact."""
    tiny = _less(x, 2.0**-126)
    bits = E.unary("bitcast_f2i", E.select(tiny, _mul(x, _f(2.0**24)), x))
    offset = E.const(0x3F3504F3, "i32")  # sqrt(1/2)
    shifted = E.binary("sub", bits, offset)
    exponent = E.binary("sar", shifted, E.const(23, "i32"))
    mantissa = E.unary("bitcast_i2f", E.binary("sub", bits, E.binary("shl", exponent, E.const(23, "i32"))))
    whole = _sub(E.unary("i2f", exponent), E.select(tiny, _f(24.0), _ZERO))
    out = _add(whole, _mul(E.unary("log", mantissa), _f(1 / math.log(2))))
    regular = E.binary("and", E.binary("lt", _ZERO, x), _less(x, math.inf))
    return E.select(regular, out, E.unary("log", x))


rules({
    "atan": lambda x: E.binary("atan2", x, _ONE), "asin": lambda x: E.binary("atan2", x, _cosine_side(x)),
    "acos": lambda x: E.binary("atan2", _cosine_side(x), x), "sinh": _sinh, "cosh": _cosh, "asinh": _asinh,
    "acosh": _acosh, "atanh": _atanh, "erfc": _erfc, "erf_inv": _erf_inv, "lgamma": _lgamma, "digamma": _digamma,
    "log2": _log2,
}, lambda f: elementwise(lambda _, a: f(a[0])))  # fmt: skip
