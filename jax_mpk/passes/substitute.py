"""Fusion by substitution: replacing the loads of a value by the expression that computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from jax_mpk.ir import algebra
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Load
from jax_mpk.ir.graph import Append, Attention, Contract, Map, Op, Update

PLAIN = frozenset(("rhs0", "rhs1", "rhs2", "rhs3", "k", "v"))
"""Roles that must stay plain loads, because the core streams them."""


@functools.lru_cache(1 << 12)
def at(e: Expr, coords: tuple[Coord, ...]) -> Expr:
    """The expression `e` of a domain at the point `coords`; raises `NotAffine`."""
    return E.substitute_axes(e, dict(enumerate(coords)))


def inline(op: Op, table: Mapping[int, Expr], gone: AbstractSet[int] = frozenset()) -> Op:
    """`op` with the loads of values in `table` replaced by their expressions (over the value's own index space).

    A load stays, so that its value must be computed after all, where the index map does not compose, where the role
    needs a plain load, or where the expression reads a value in `gone` (overwritten in place by now).
    """

    def replacement(role: str) -> Callable[[Load], Expr | None]:
        def f(x: Load) -> Expr | None:
            e = table.get(x.value)
            if e is None or e.loads & gone:
                return None
            try:
                out = at(e, x.coords)
            except E.NotAffine:
                return None
            plain = role in PLAIN and isinstance(op, Contract | Attention)
            return None if plain and not isinstance(out, Load) else out

        return f

    exprs = {}
    for role, e in op.exprs().items():
        if e.loads & table.keys():
            exprs[role] = algebra.simplify(E.substitute_loads(e, replacement(role)))
    return settle(op.with_exprs(exprs)) if exprs else op


def settle(op: Op) -> Op:
    """Makes store coordinates static where their dynamic part has become a plain index."""

    def fix(a: Append) -> Append:
        coords = tuple(algebra.settle(c) for c in a.coords)
        oob = a.oob if any(c.dyn is not None for c in coords) else "clamp"
        return a if coords == a.coords else replace(a, coords=coords, oob=oob)

    if isinstance(op, Update):
        return replace(op, append=fix(op.append))
    if isinstance(op, Attention):
        return replace(op, appends=tuple(fix(a) for a in op.appends))
    return op


def expand(e: Expr, maps: Mapping[int, Map], keep: frozenset[int] = frozenset()) -> Expr:
    """`e` with every load of a map's value replaced by that map's expression, transitively."""
    memo: dict[int, Expr] = {}

    def body(v: int) -> Expr:
        if v not in memo:
            memo[v] = E.substitute_loads(maps[v].expr, f)
        return memo[v]

    def f(x: Load) -> Expr | None:
        if x.value not in maps or x.value in keep or maps[x.value].store is not None:
            return None
        try:
            return at(body(x.value), x.coords)
        except E.NotAffine:
            return None

    return algebra.simplify(E.substitute_loads(e, f))
