"""Splitting domain axes, and recognising when two index spaces are the same up to reshape and permutation."""

from __future__ import annotations

from collections.abc import Iterable

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord


def plain_axis(c: Coord) -> int | None:
    """The axis, if the coordinate is exactly one whole axis."""
    if c.dyn is None and c.const == 0 and len(c.terms) == 1:
        t = c.terms[0]
        if t.coef == 1 and t.div == 1 and not t.mod:
            return t.axis
    return None


def digit_divisors(coords: Iterable[Coord], axis: int, extent: int) -> list[int]:
    """The sorted divisors at which the coordinates cut `axis` into digits; without 1 and the extent."""
    cuts = set()
    for c in coords:
        for t in c.terms:
            if t.axis == axis:
                cuts.add(t.div)
                if t.mod:
                    cuts.add(t.div * t.mod)
    return sorted(d for d in cuts if 1 < d < extent)


def split(extent: int, cuts: list[int]) -> tuple[int, ...] | None:
    """The extents of the digits, slowest first, or None when the cuts do not nest."""
    out, last = [], 1
    for d in [*cuts, extent]:
        if d % last:
            return None
        out.append(d // last)
        last = d
    return tuple(reversed(out))


def inverse(coords: tuple[Coord, ...], outer: tuple[int, ...], inner: tuple[int, ...]) -> tuple[Coord, ...] | None:
    """If `coords` (over axes of shape `outer`) enumerate shape `inner` exactly once, the map from inner to outer.

    Handles permutations of axes and reshapes; extents of 1 do not matter. None when it is neither.
    """
    if len(coords) == len(inner):
        axes = [plain_axis(c) for c in coords]
        if all(a is not None or (n == 1 and c == Coord()) for a, c, n in zip(axes, coords, inner, strict=True)):
            used = [a for a in axes if a is not None]
            big = [a for a, n in enumerate(outer) if n > 1]
            if sorted(used) == big and all(outer[a] == n for a, n in zip(axes, inner, strict=True) if a is not None):
                back = {a: E.coord_axis(i, inner[i]) for i, a in enumerate(axes) if a is not None}
                return tuple(back.get(a, Coord()) for a in range(len(outer)))
    point = tuple(E.coord_axis(a, n) for a, n in enumerate(outer))
    if _size(outer) == _size(inner) and E.reshape_coords(point, outer, inner) == coords:
        return E.reshape_coords(tuple(E.coord_axis(a, n) for a, n in enumerate(inner)), inner, outer)
    return None


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
