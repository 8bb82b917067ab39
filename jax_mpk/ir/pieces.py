"""Concatenation in code: an expression with `Piece` nodes is a list of boxes, each with an expression without them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from jax_mpk.errors import MpkError
from jax_mpk.ir import expr as E
from jax_mpk.ir.algebra import fold_constants
from jax_mpk.ir.expr import Coord, Expr, Piece


class NotRefined(MpkError):
    """The graph did not pass `jax_mpk.passes.refine`: a compiler bug."""


Box = dict[int, tuple[int, int]]
"""Range `lo <= i < hi` per axis id."""


def boxes(e: Expr, box: Box) -> list[tuple[Box, Expr]]:
    """Disjoint boxes that make up `box`, with `e` there; no piece over an axis of the box is left, nor an operation of
    constants: the boxes of a part of `e` are parts of the boxes of `e`."""
    return [(b, fold_constants(x)) for b, x in _boxes(e, box)]


def _boxes(e: Expr, box: Box) -> list[tuple[Box, Expr]]:
    e = _resolve(e, box)
    pieces = [x for x in E.walk(e) if isinstance(x, Piece) and piece_axis(x) in box]
    if not pieces:
        return [(box, e)]
    x = pieces[-1]  # inside of no other piece
    axis, shift = piece_axis(x), x.coord.const
    if x.bounds[0] - shift > box[axis][0] or x.bounds[-1] - shift < box[axis][1]:
        raise NotRefined(f"{x} has no part for all of {box[axis]}")
    out = []
    for low, high in itertools.pairwise(x.bounds):
        lo, hi = max(box[axis][0], low - shift), min(box[axis][1], high - shift)
        if lo < hi:
            out += _boxes(e, box | {axis: (lo, hi)})
    return out


def piece_axis(x: Piece) -> int:
    """The axis of the piece's coordinate, which is one plain axis plus a constant (`refine` sees to that)."""
    t = x.coord.terms[0]
    if len(x.coord.terms) != 1 or t.coef != 1 or t.div != 1 or t.mod or x.coord.dyn is not None:
        raise NotRefined(f"the coordinate of {x} is not an axis")
    return t.axis


def _resolve(e: Expr, box: Mapping[int, tuple[int, int]]) -> Expr:
    memo: dict[Expr, Expr] = {}
    pieces: dict[Expr, bool] = {}
    for x in E.walk(e):
        pieces[x] = isinstance(x, Piece) or any(pieces[a] for a in x.args())

    def go(x: Expr) -> Expr:
        if not pieces.get(x, True):
            return x
        hit = memo.get(x)
        if hit is None:
            memo[x] = hit = step(x)
        return hit

    def step(x: Expr) -> Expr:
        if isinstance(x, Piece) and (axis := piece_axis(x)) in box:
            lo, hi = (b + x.coord.const for b in box[axis])
            for j, part in enumerate(x.parts):
                if x.bounds[j] <= lo and hi <= x.bounds[j + 1]:
                    return go(part)
        return E.rebuild(x, go, coord)

    def coord(c: Coord) -> Coord:
        return c if c.dyn is None else Coord(c.const, c.terms, go(c.dyn), c.limit)

    return go(e)
