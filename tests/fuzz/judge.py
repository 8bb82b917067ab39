"""Whether two results are the same function: exact where bits are determined, else by the size of rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
TINY = 2.0**-126
"""Floats below this are zero to the one and not to the other: XLA's CPU threads flush them (docs/decisions.md)."""

Wide = Callable[[], tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]
"""The results in float64, without and with the roundings of narrow types."""


def differs(have: np.ndarray, want: np.ndarray, exact: bool, n: int, wide: Wide) -> str:
    """ "" if result `n` is right, else what is wrong with it; `want` is `jax.jit`'s."""
    if have.shape != want.shape or have.dtype != want.dtype:
        return f"{have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
    if have.dtype.name not in EPS:
        return _where(have != want, have, want) if (have != want).any() else ""
    a, b = have.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        if exact:
            zero = (np.abs(a) < TINY) & (np.abs(b) < TINY)
            sign = (a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b))
            bad = ~((a == b) | (np.isnan(a) & np.isnan(b)) | zero) | sign
            return _where(bad, have, want) if bad.any() else ""
        eps = EPS[have.dtype.name]
        near = np.abs(a - b) <= 8 * eps * np.abs(b) + TINY
        bad = ~(near | (a == b) | (np.isnan(a) & np.isnan(b)))
        if not bad.any():
            return ""
        exactly, rounded = (np.asarray(x[n], np.float64) for x in wide())
        if exactly.shape != a.shape:
            return f"the reference has shape {list(exactly.shape)}"
        theirs, strict = np.abs(b - exactly), np.abs(rounded - exactly)
        noise = max(np.max(x, initial=0.0, where=np.isfinite(x)) for x in (theirs, strict))
        size = np.max(np.abs(exactly), initial=0.0, where=np.isfinite(exactly))
        largest = 3.38e38 if have.dtype.name != "float16" else 65504.0
        close = np.abs(a - exactly) <= 6 * noise + 16 * eps * np.abs(exactly) + 4 * 2.0**-23 * size + TINY
        over = (
            (np.abs(exactly) >= largest * 0.98) & ~np.isnan(exactly) & (np.abs(a) >= largest * 0.98)
        )  # may overflow or not
        bad &= ~(close | over | (np.isnan(a) & np.isnan(exactly)) | (a == exactly))
    return _where(bad, have, want, exactly) if bad.any() else ""


def _where(bad: np.ndarray, have: np.ndarray, want: np.ndarray, exactly: np.ndarray | None = None) -> str:
    at = tuple(int(i[0]) for i in np.nonzero(bad)) if bad.ndim else ()
    third = "" if exactly is None else f", float64 {exactly[at]}"
    return f"{int(bad.sum())} of {bad.size} elements, at {list(at)}: {have[at]}, jit {want[at]}{third}"
