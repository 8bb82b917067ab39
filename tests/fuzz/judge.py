"""Whether two results are the same function: exact where bits are determined, else by the size of rounding errors."""

from __future__ import annotations

import numpy as np

from tests.fuzz.wide import Reference

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
TINY = 2.0**-126
"""Floats below this are zero to the one and not to the other: XLA's CPU threads flush them (docs/decisions.md)."""


def differs(have: np.ndarray, want: np.ndarray, exact: bool, n: int, reference: Reference) -> str:
    """ "" if result `n` is right, else what is wrong with it; `want` is `jax.jit`'s. Raises `wide.NoReference`."""
    if have.shape != want.shape or have.dtype != want.dtype:
        return f"{have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
    if have.dtype.name not in EPS:
        return _where(have != want, have, want) if (have != want).any() else ""
    a, b = have.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        if exact:
            zero = (np.abs(a) < TINY) & (np.abs(b) < TINY)
            sign = (a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b))
            if sign.any():  # XLA takes 0 + x for x, also of -0
                step = reference.stepwise[n].astype(np.float64)
                sign &= (step != 0) | (np.signbit(a) != np.signbit(step))
            bad = ~((a == b) | (np.isnan(a) & np.isnan(b)) | zero) | sign
            return _where(bad, have, want) if bad.any() else ""
        eps = EPS[have.dtype.name]
        near = np.isfinite(b) & (np.abs(a - b) <= 8 * eps * np.abs(b) + TINY)
        bad = ~(near | (a == b) | (np.isnan(a) & np.isnan(b)))
        if not bad.any():
            return ""
        exactly, rounded = (np.asarray(x[n], np.float64) for x in (reference.exactly, reference.rounded))
        if exactly.shape != a.shape:
            return f"the reference has shape {list(exactly.shape)}"
        theirs, strict = np.abs(b - exactly), np.abs(rounded - exactly)
        noise = max(np.max(x, initial=0.0, where=np.isfinite(x)) for x in (theirs, strict))
        size = np.max(np.abs(exactly), initial=0.0, where=np.isfinite(exactly))
        largest = 3.38e38 if have.dtype.name != "float16" else 65504.0
        finite = np.isfinite(exactly)
        close = finite & (np.abs(a - exactly) <= 6 * noise + 16 * eps * np.abs(exactly) + 4 * 2.0**-23 * size + TINY)
        same_sign = np.signbit(a) == np.signbit(exactly)
        over = same_sign & (np.abs(exactly) >= largest * 0.98) & (np.abs(a) >= largest * 0.98)  # may overflow or not
        for x in (exactly, rounded):  # where only one of them overflows, infinity minus infinity is no number
            bad &= ~((a == x) | (np.isnan(a) & np.isnan(x)))
        bad &= ~(close | over)
        if bad.any():
            shaken = np.max(np.abs(reference.shaken[n] - exactly), axis=0)
            bad &= ~(finite & (np.abs(a - exactly) <= 8 * shaken))
    return _where(bad, have, want, exactly) if bad.any() else ""


def _where(bad: np.ndarray, have: np.ndarray, want: np.ndarray, exactly: np.ndarray | None = None) -> str:
    at = tuple(int(i[0]) for i in np.nonzero(bad)) if bad.ndim else ()
    third = "" if exactly is None else f", float64 {exactly[at]}"
    return f"{int(bad.sum())} of {bad.size} elements, at {list(at)}: {have[at]}, jit {want[at]}{third}"
