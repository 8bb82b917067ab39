"""Cumulative sums, products and extremes: rows in blocks, each block on its own, then what came before it.

Two operators whatever the length, and about 2 * sqrt(n) terms an element. Elements that do not fill a block are a last,
shorter one. Sums of narrow floats stay float32 until the end.
"""

from __future__ import annotations

import math

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.reduction import combine, neutral, over
from jax_mpk.frontend.registry import Rule, rules
from jax_mpk.frontend.shape import joined, sliced
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr

DIRECT = 48
"""Up to this length each result is one reduction over a masked row."""

_KINDS = {"cumsum": "sum", "cumprod": "prod", "cummax": "max", "cummin": "min", "cumlogsumexp": "logsumexp"}


def _cumulative(op: str) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
        if x.dtype == "bool":
            b.unsupported("booleans")
        return scanned(b, b.materialise(x), eqn.params["axis"], eqn.params["reverse"], op)

    return rule


def scanned(b: Builder, x: Tensor, axis: int, reverse: bool, op: str) -> Tensor:
    """`x` with every element along `axis` combined with those before it (`reverse`: behind it)."""
    n = x.shape[axis]
    if n == 1:
        return x
    if n <= DIRECT:
        coords = identity(x.shape)
        e = _row(x, coords, coords[axis], E.coord_axis(E.REDUCE_AXIS, n), axis, reverse, op)
        return b.map(x.shape, x.dtype, rounded(e, x.dtype))
    block = 1 << math.ceil(math.log2(math.sqrt(n)))
    whole = n // block * block
    cut = n - whole if reverse else whole  # the short block is the last one that is reached
    first, rest = (sliced(b, x, *_along(x, axis, *r)) for r in ((0, cut), (cut, n)))
    long, short = (rest, first) if reverse else (first, rest)
    local = _blocks(b, long, axis, block, reverse, op)
    parts = [_joined_blocks(b, local, x.dtype, axis, reverse, op)]
    if short.shape[axis]:
        coords = identity(short.shape)
        own = _row(short, coords, coords[axis], E.coord_axis(E.REDUCE_AXIS, short.shape[axis]), axis, reverse, op)
        before = _totals(local, coords, None, axis, reverse, op)
        e = rounded(combine(op, before, own), x.dtype)
        parts.append(b.map(short.shape, x.dtype, e))
    if len(parts) == 1:
        return parts[0]
    out, at = [], 0
    for p in reversed(parts) if reverse else parts:
        place = list(identity(x.shape))
        size = p.shape[axis]
        place[axis] = E.coord_add(place[axis], E.coord_const(-at)) if size > 1 else E.coord_const(0)
        out.append((p.at(place), size))
        at += size
    return joined(b, out, axis, x.shape, x.dtype)


def _along(x: Tensor, axis: int, start: int, stop: int) -> tuple[list[int], list[int]]:
    low, high = [0] * len(x.shape), list(x.shape)
    low[axis], high[axis] = start, stop
    return low, high


def _row(x: Tensor, coords: tuple[Coord, ...], here: Coord, there: Coord, axis: int, reverse: bool, op: str,
         base: Coord | None = None) -> Expr:  # fmt: skip
    """The combination of `x` at `base + there` for all `there` (over the first reduction axis) up to `here`."""
    i, j = E.index(here), E.index(there)
    seen = E.binary("le", i, j) if reverse else E.binary("le", j, i)
    at = [*coords[:axis], there if base is None else E.coord_add(base, there), *coords[axis + 1 :]]
    e = E.select(seen, x.at(at), neutral(op, x.dtype))
    return over(op, e, (E.REDUCE_AXIS,), (there.max + 1,))


def _blocks(b: Builder, x: Tensor, axis: int, block: int, reverse: bool, op: str) -> Tensor:
    """Every block on its own: `x` with `axis` as two, in the type of sums."""
    shape = (*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    coords = identity(shape)
    base = E.coord_scale(coords[axis], block)
    plain = (*coords[:axis], coords[axis + 1], *coords[axis + 2 :])
    e = _row(x, plain, coords[axis + 1], E.coord_axis(E.REDUCE_AXIS, block), axis, reverse, op, base)
    wide = x.dtype if op in ("max", "min") else x.compute
    return b.map(shape, wide, e)


def _totals(local: Tensor, coords: tuple[Coord, ...], here: Coord | None, axis: int, reverse: bool, op: str) -> Expr:
    """What the blocks before block `here` (None: all blocks) combine to, at the other coordinates of `coords`."""
    count, block = local.shape[axis], local.shape[axis + 1]
    there = E.coord_axis(E.REDUCE_AXIS, count)
    last = E.coord_const(0 if reverse else block - 1)
    e = local.at([*coords[:axis], there, last, *coords[axis + 1 :]])
    if here is not None:
        i, j = E.index(here), E.index(there)
        e = E.select(E.binary("lt", i, j) if reverse else E.binary("lt", j, i), e, neutral(op, local.dtype))
    return over(op, e, (E.REDUCE_AXIS,), (count,)) if count > 1 else e


def _joined_blocks(b: Builder, local: Tensor, dtype: str, axis: int, reverse: bool, op: str) -> Tensor:
    """The blocks combined with what comes before them, `axis` one again."""
    coords = identity(local.shape)
    plain = (*coords[:axis], coords[axis], *coords[axis + 2 :])
    e = local.at(coords)
    if local.shape[axis] > 1:
        e = combine(op, _totals(local, plain, coords[axis], axis, reverse, op), e)
    shape = (*local.shape[:axis], local.shape[axis] * local.shape[axis + 1], *local.shape[axis + 2 :])
    flat = E.coord_add(E.coord_scale(coords[axis], local.shape[axis + 1]), coords[axis + 1])
    store = (*coords[:axis], flat, *coords[axis + 2 :])
    return b.map(shape, dtype, rounded(e, dtype), domain=local.shape, store=store)


rules(_KINDS, _cumulative)
