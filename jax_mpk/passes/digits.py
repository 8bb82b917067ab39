"""Digits of axes: which cuts make coordinates affine, and the rewriting of those that cannot be.

A digit `(axis // div) % mod` becomes an axis of its own when the axis is split at `div` and `div * mod`. Cuts of one
axis must divide each other; a digit whose cuts do not is computed by integer arithmetic in a dynamic coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Index, Load, Piece, Term
from jax_mpk.ir.graph import Value
from jax_mpk.ir.loops import address
from jax_mpk.passes.axes import split


def is_digit(t: Term) -> bool:
    return t.div != 1 or bool(t.mod)


def addresses(values: Mapping[int, Value], e: Expr) -> Iterator[tuple[int, Coord]]:
    """Every static coordinate that code must compute for `e`, with a priority (the lowest number counts most).

    Loads come before those loads whose digits merge in the address (they need no cut, but must survive the cuts of
    others), then pieces, then indices.
    """
    for x in E.walk(e):
        if isinstance(x, Load):
            rank = 2 if any(map(is_digit, address(values[x.value], x.coords).terms)) else 3
            yield from ((rank, Coord(c.const, c.terms)) for c in x.coords)
        elif isinstance(x, Piece):
            yield 4, x.coord
        elif isinstance(x, Index):
            yield 5, x.coord


def has_digits(values: Mapping[int, Value], e: Expr) -> bool:
    """Whether some address, piece or index of `e` is not affine."""
    for x in E.walk(e):
        if isinstance(x, Load):
            if any(map(is_digit, address(values[x.value], x.coords).terms)):
                return True
            if any(is_digit(t) for c in x.coords if c.dyn is not None for t in c.terms):
                return True
        elif isinstance(x, Piece | Index) and any(map(is_digit, x.coord.terms)):
            return True
    return False


def choose(found: Iterable[tuple[int, Coord]], extent: Mapping[int, int],
           whole: frozenset[int] = frozenset()) -> dict[int, list[int]]:  # fmt: skip
    """The cuts of every axis: those of the most important coordinates first, others while they nest.

    Axes in `whole` are not cut.
    """
    cuts: dict[int, set[int]] = {}
    for _, c in sorted(found, key=lambda x: x[0]):
        for t in c.terms:
            if is_digit(t) and t.axis in extent and t.axis not in whole:
                n = extent[t.axis]
                new = cuts.get(t.axis, set()) | {d for d in (t.div, t.div * (t.mod or 1)) if 1 < d < n}
                if split(n, sorted(new)) is not None:
                    cuts[t.axis] = new
    return {a: sorted(c) for a, c in cuts.items() if c}


def plain_after(t: Term, cuts: Mapping[int, list[int]], extent: Mapping[int, int]) -> bool:
    """Whether the term has no digits left once its axis is cut."""
    if not is_digit(t) or t.axis not in extent:
        return True
    n = extent[t.axis]
    ends = {1, n, *cuts.get(t.axis, ())}
    return t.div in ends and (not t.mod or t.div * t.mod in ends) and (bool(t.mod) or n % t.div == 0)


def value_of(c: Coord, bad: Callable[[Term], bool]) -> Expr:
    """The i32 value of a static coordinate, with the digits for which `bad` holds computed by division."""
    out = E.index(Coord(c.const, tuple(t for t in c.terms if not bad(t))))
    for t in c.terms:
        if bad(t):
            n = t.extent * t.div if not t.mod else t.div * t.mod * 2  # any extent that keeps the axis in the coordinate
            digit = E.index(Coord(0, (Term(1, t.axis, 1, 0, n),)))
            digit = digit if t.div == 1 else E.binary("div", digit, E.const(t.div, "i32"))
            digit = E.binary("rem", digit, E.const(t.mod, "i32")) if t.mod else digit
            out = E.binary("add", out, digit if t.coef == 1 else E.binary("mul", digit, E.const(t.coef, "i32")))
    return out


def compute_digits(values: Mapping[int, Value], e: Expr, bad: Callable[[Term], bool]) -> Expr:
    """`e` with every load and index that has a `bad` digit rewritten to compute it (pieces are left alone)."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        hit = memo.get(x)
        if hit is None:
            memo[x] = hit = step(x)
        return hit

    def step(x: Expr) -> Expr:
        if isinstance(x, Index):
            return value_of(x.coord, bad) if any(map(bad, x.coord.terms)) else x
        if isinstance(x, Load):
            v = values[x.value]
            return E.load(x.value, tuple(map(lambda c, n: static(c, n), x.coords, v.shape)), x.dtype)
        return E.rebuild(x, go, lambda c: c)

    def dynamic(c: Coord) -> Coord:
        if not any(map(bad, c.terms)):
            return Coord(c.const, c.terms, go(c.dyn), c.limit)  # type: ignore[arg-type]
        return Coord(0, (), E.binary("add", value_of(Coord(c.const, c.terms), bad), go(c.dyn)), c.limit)  # type: ignore[arg-type]

    def static(c: Coord, extent: int) -> Coord:
        if c.dyn is not None:
            return dynamic(c)
        return Coord(0, (), value_of(c, bad), extent - 1) if any(map(bad, c.terms)) else c

    return go(e)


def plain_pieces(values: Mapping[int, Value], e: Expr, bad: Callable[[Piece], bool] | None = None) -> Expr:
    """`e` with every piece decided by one plain axis; where that cannot be, by selects between clamped parts.

    With `bad`, only the pieces for which it holds change, and they become selects.
    """
    memo: dict[tuple[Expr, E.Ranges], Expr] = {}

    def go(x: Expr, ranges: E.Ranges) -> Expr:
        key = (x, ranges)
        hit = memo.get(key)
        if hit is None:
            memo[key] = hit = step(x, ranges)
        return hit

    def step(x: Expr, ranges: E.Ranges) -> Expr:
        if not isinstance(x, Piece):
            return E.rebuild(x, lambda y: go(y, ranges), lambda c: coord(c, ranges))
        new = _on_axis(x) if bad is None else None if bad(x) else x
        if new is not None:
            if not isinstance(new, Piece):
                return go(new, ranges)
            parts = [go(p, E.restrict(ranges, new.coord, lo, hi))
                     for p, lo, hi in zip(new.parts, new.bounds, new.bounds[1:], strict=False)]  # fmt: skip
            return E.piece(new.coord, new.bounds, tuple(parts))
        at = value_of(x.coord, is_digit)
        out = clamped(values, go(x.parts[-1], ranges), ranges)
        for part, bound in reversed(list(zip(x.parts[:-1], x.bounds[1:], strict=False))):
            here = clamped(values, go(part, ranges), ranges)
            out = E.select(E.binary("lt", at, E.const(bound, "i32")), here, out)
        return out

    def coord(c: Coord, ranges: E.Ranges) -> Coord:
        return c if c.dyn is None else Coord(c.const, c.terms, go(c.dyn, ranges), c.limit)

    return go(e, ())


def _on_axis(x: Piece) -> Expr | None:
    """The same concatenation decided by one plain axis, if the others cannot change the part."""
    c = x.coord
    if any(map(is_digit, c.terms)) or not c.terms:
        return None
    top = max(c.terms, key=lambda t: (abs(t.coef), t.extent))
    if len(c.terms) == 1 and top.coef == 1:
        return x
    rest = Coord(c.const, tuple(t for t in c.terms if t is not top))
    cuts = []
    for bound in x.bounds[1:-1]:  # the first index of `top` from which the coordinate is beyond the bound
        if top.coef > 0:
            q = -((rest.min - bound) // top.coef)
            if not top.coef * (q - 1) + rest.max < bound <= top.coef * q + rest.min:
                return None
        else:
            q = (rest.max - bound) // -top.coef + 1
            if not top.coef * q + rest.max < bound <= top.coef * (q - 1) + rest.min:
                return None
        cuts.append(min(max(q, 0), top.extent))
    parts = x.parts
    if top.coef < 0:
        cuts, parts = cuts[::-1], parts[::-1]
    bounds = (0, *cuts, top.extent)
    return E.piece(Coord(0, (Term(1, top.axis, 1, 0, top.extent),)), bounds, parts)


def clamped(values: Mapping[int, Value], e: Expr, ranges: E.Ranges = ()) -> Expr:
    """`e` with the loads that may be out of bounds over `ranges` clamped, and pieces for every index: safe to evaluate
    where it is not used."""
    memo: dict[tuple[Expr, E.Ranges], Expr] = {}

    def go(x: Expr, ranges: E.Ranges) -> Expr:
        key = (x, ranges)
        hit = memo.get(key)
        if hit is None:
            memo[key] = hit = step(x, ranges)
        return hit

    def step(x: Expr, ranges: E.Ranges) -> Expr:
        if isinstance(x, Load):
            coords = tuple(coord(c, ranges, n) for c, n in zip(x.coords, values[x.value].shape, strict=True))
            return E.load(x.value, coords, x.dtype)
        if isinstance(x, Piece):  # the first and the last part stand for what lies beyond them
            low, high = E.coord_range(x.coord, ranges)
            bounds = (min(x.bounds[0], low), *x.bounds[1:-1], max(x.bounds[-1], high + 1))
            parts = [
                go(p, E.restrict(ranges, x.coord, lo, hi))
                for p, lo, hi in zip(x.parts, bounds, bounds[1:], strict=False)
            ]
            return E.piece(x.coord, bounds, tuple(parts))
        return E.rebuild(x, lambda y: go(y, ranges), lambda c: c)

    def coord(c: Coord, ranges: E.Ranges, extent: int) -> Coord:
        if c.dyn is not None:
            return Coord(c.const, c.terms, go(c.dyn, ranges), c.limit)
        lo, hi = E.coord_range(c, ranges)
        return c if lo >= 0 and hi < extent else Coord(0, (), value_of(c, lambda _: False), extent - 1)

    return go(e, ranges)
