"""Coordinates: quasi-affine functions of axes, the index maps of tensors.

Axes are small integers. A coordinate is a constant, a sum of digits `(axis // div) % mod` of axes, and possibly a
dynamic integer expression. Digits compose: reshape, transpose, slice and broadcast of a tensor are substitutions of
coordinates, and stay coordinates. (The normal form is that of iterator maps, as in TVM.)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jax_mpk.ir.expr import Expr

CORE_AXIS = 32
"""Axis ids `32 .. 63` belong to a core: the contracted axes of a contraction, the key and head axes of attention."""
REDUCE_AXIS = 64
"""Axis ids from here on are bound by a `Reduce`; ids below `CORE_AXIS` are the axes of the operator's domain."""


class Term(NamedTuple):
    """`coef * ((axis // div) % mod)`; `mod` is 0 for "no modulus". The range of the digit is `0 .. extent-1`."""

    coef: int
    axis: int
    div: int
    mod: int
    extent: int


class Coord(NamedTuple):
    """A coordinate: `const + sum(terms) + dyn`, where `dyn` is an integer expression or None.

    A dynamic coordinate is clamped to `[0, limit]` *after* everything is added, which is what XLA does for
    dynamic_slice; out-of-bounds rules other than clamping are expressed around the load with a select.
    """

    const: int = 0
    terms: tuple[Term, ...] = ()
    dyn: Expr | None = None
    limit: int = 0

    @property
    def is_const(self) -> bool:
        return not self.terms and self.dyn is None

    @property
    def max(self) -> int:
        """The largest value of the static part."""
        return self.const + sum(t.coef * (t.extent - 1) for t in self.terms if t.coef > 0)

    @property
    def min(self) -> int:
        """The smallest value of the static part."""
        return self.const + sum(t.coef * (t.extent - 1) for t in self.terms if t.coef < 0)

    def axes(self) -> frozenset[int]:
        """Every axis that the coordinate depends on, through its dynamic part too."""
        own = _axes(self.terms)
        return own | self.dyn.axes if self.dyn is not None else own


@lru_cache(1 << 12)
def _axes(terms: tuple[Term, ...]) -> frozenset[int]:
    return frozenset(t.axis for t in terms)


@lru_cache(1 << 12)
def coord_axis(axis: int, extent: int) -> Coord:
    """The coordinate that is the axis itself."""
    return Coord(0, (Term(1, axis, 1, 0, extent),) if extent > 1 else ())


def digit_extent(extent: int, div: int, mod: int) -> int:
    """The extent of the digit `(axis // div) % mod` (`mod` 0: none) of an axis."""
    n = -(-extent // div)
    return min(n, mod) if mod else n


def coord_const(value: int) -> Coord:
    return Coord(int(value))


def collect(const: int, terms: Iterable[Term], dyn: Expr | None = None, limit: int = 0) -> Coord:
    """Sums equal digits, drops zeros, and re-joins `a*(x//n) + b*(x%n)` where `a == b*n`."""
    c = _collected(const, tuple(terms))
    return c if dyn is None and not limit else Coord(const, c.terms, dyn, limit)


@lru_cache(1 << 14)
def _collected(const: int, terms: tuple[Term, ...]) -> Coord:
    if len(terms) < 2:
        return Coord(const, terms if terms and terms[0].extent > 1 and terms[0].coef else ())
    acc: dict[tuple[int, int, int, int], int] = {}
    for t in terms:
        if t.extent > 1 and t.coef:
            key = (t.axis, t.div, t.mod, t.extent)
            acc[key] = acc.get(key, 0) + t.coef
    out = [Term(c, a, d, m, e) for (a, d, m, e), c in acc.items() if c]
    changed = len(out) > 1
    while changed:
        changed = False
        for hi in out:
            for lo in out:
                if hi is lo or hi.axis != lo.axis or not lo.mod:
                    continue
                if hi.div == lo.div * lo.mod and hi.coef == lo.coef * lo.mod and lo.extent == lo.mod:
                    mod = hi.mod * lo.mod if hi.mod else 0
                    out = [t for t in out if t is not hi and t is not lo]
                    out.append(Term(lo.coef, lo.axis, lo.div, mod, hi.extent * lo.mod))
                    changed = True
                    break
            if changed:
                break
    out.sort(key=lambda t: (t.axis, -t.div, t.mod))
    return Coord(const, tuple(out))


def coord_add(a: Coord, b: Coord) -> Coord:
    """The sum; at most one of the two may be dynamic."""
    if a.dyn is not None and b.dyn is not None:
        raise ValueError("the sum of two dynamic coordinates must be one dynamic expression")
    dyn, limit = (a.dyn, a.limit) if a.dyn is not None else (b.dyn, b.limit)
    return collect(a.const + b.const, a.terms + b.terms, dyn, limit)


def coord_scale(a: Coord, k: int) -> Coord:
    if a.dyn is not None:
        raise ValueError("a dynamic coordinate cannot be scaled")
    return collect(a.const * k, [Term(t.coef * k, t.axis, t.div, t.mod, t.extent) for t in a.terms])


def coord_split(c: Coord, n: int) -> tuple[Coord, Coord] | None:
    """`(c // n, c % n)` of a static coordinate `c >= 0`, or None when that is not quasi-affine."""
    if c.dyn is not None or c.min < 0:
        return None
    if n == 1:
        return c, coord_const(0)
    hi: list[Term] = []
    lo: list[Term] = []
    for t in c.terms:
        if t.coef % n == 0:
            hi.append(Term(t.coef // n, t.axis, t.div, t.mod, t.extent))
        elif t.coef > 0 and n % t.coef == 0 and t.extent * t.coef > n and t.extent % (n // t.coef) == 0:
            q = n // t.coef  # the digit itself splits: t = (t // q) * q + t % q
            hi.append(Term(1, t.axis, t.div * q, t.mod // q if t.mod else 0, t.extent // q))
            lo.append(Term(t.coef, t.axis, t.div, q, q))
        else:
            lo.append(t)
    const_lo = c.const % n
    low = const_lo + sum(t.coef * (t.extent - 1) for t in lo if t.coef > 0)
    if any(t.coef < 0 for t in lo) or low >= n:
        return None
    return collect(c.const // n, hi), collect(const_lo, lo)


def reshape_coords(coords: tuple[Coord, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Coord, ...] | None:
    """Coordinates into shape `new` of the element at `coords` of shape `old` (row-major, equal sizes).

    Returns None when a coordinate does not split (or a dynamic one would have to be split or merged).
    """
    out: list[Coord] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j]:
            out.append(coords[i])
            i, j = i + 1, j + 1
            continue
        a, b, pi, pj = i, j, 1, 1
        while pi != pj or (i == a and j == b):  # the smallest groups with equal products
            if (pi <= pj and i < len(old)) or j >= len(new):
                pi *= old[i]
                i += 1
            else:
                pj *= new[j]
                j += 1
        while i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            i += 1
        while j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            j += 1
        group = [(coords[k], old[k]) for k in range(a, i) if old[k] != 1]
        dims = [k for k in range(b, j) if new[k] != 1]
        if len(group) == 1 and len(dims) == 1:
            flat = group[0][0]
        else:
            flat, scale = coord_const(0), 1
            for c, n in reversed(group):
                if c.dyn is not None:
                    return None
                flat = coord_add(flat, coord_scale(c, scale))
                scale *= n
        parts: dict[int, Coord] = {}
        for k in reversed(dims[1:]):
            split = coord_split(flat, new[k])
            if split is None:
                return None
            flat, parts[k] = split
        if dims:
            parts[dims[0]] = flat
        out.extend(parts.get(k, coord_const(0)) for k in range(b, j))
    return tuple(out)


Ranges = tuple[tuple[int, int, int], ...]
"""Restrictions (axis, lo, hi): the axis runs over `lo <= i < hi` only. Axes that are not listed run over their extent."""


UNKNOWN = (-1, 0, 1)
"""Stands in `Ranges` for a restriction that is no range of an axis: bounds cannot be told from the ranges alone."""


def restrict(ranges: Ranges, coord: Coord, lo: int, hi: int) -> Ranges:
    """`ranges` and `lo <= coord < hi`; exact where the coordinate is one term without modulus, else `UNKNOWN`."""
    if len(coord.terms) != 1 or coord.dyn is not None or coord.terms[0].mod:
        return ranges if UNKNOWN in ranges else (UNKNOWN, *ranges)
    t = coord.terms[0]
    lo, hi = lo - coord.const, hi - coord.const
    if t.coef < 0:
        lo, hi = 1 - hi, 1 - lo
    lo, hi = max(-(-lo // abs(t.coef)), 0) * t.div, min(-(-hi // abs(t.coef)), t.extent) * t.div
    known = {a: (x, y) for a, x, y in ranges}
    x, y = known.get(t.axis, (0, t.extent * t.div))
    known[t.axis] = (max(x, lo), min(y, hi))
    return tuple((a, x, y) for a, (x, y) in sorted(known.items()))


def coord_range(c: Coord, ranges: Ranges) -> tuple[int, int]:
    """Smallest and largest value of the static part under the restrictions."""
    if not c.terms:
        return c.const, c.const
    known = {a: (x, y) for a, x, y in ranges}
    lo = hi = c.const
    for t in c.terms:
        x, y = known.get(t.axis, (0, t.extent * t.div)) if not t.mod else (0, t.extent * t.div)
        a, b = t.coef * (x // t.div), t.coef * ((y - 1) // t.div)
        lo, hi = lo + min(a, b), hi + max(a, b)
    return lo, hi
