"""Operators over other axes: splitting, merging, permuting and dropping axes are one operation.

An *arrangement* lists the new axes of an operator, each a tuple of digits of old axes, slowest first. The identity
has one digit an axis; two digits of one old axis in two new axes split it; digits of two old axes in one merge them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from jax_mpk.abi import MAX_EXTENT
from jax_mpk.ir import expr as E
from jax_mpk.ir import loops
from jax_mpk.ir.expr import Coord, Expr, Term
from jax_mpk.ir.graph import APPEND_AXIS, Append, Attention, Contract, Graph, Op, Sort, Update
from jax_mpk.passes.axes import split

Digit = tuple[int, int, int]
"""(old axis, divisor, extent): the digit `(axis // divisor) % extent`."""
Arrangement = list[tuple[Digit, ...]]

LONG = 1024
"""An axis this long gains nothing from being merged with the axis around it."""


def identity(op: Op) -> Arrangement:
    """The axes of `op` as they are: the domain in its order, then the core's axes."""
    core = [x for x in loops.loop_axes(op) if x.axis >= len(op.domain)]
    return [*(((a, 1, n),) for a, n in enumerate(op.domain)), *(((x.axis, 1, x.extent),) for x in core)]


def cut(arrangement: Arrangement, cuts: dict[int, list[int]]) -> Arrangement:
    """The arrangement with single axes split at `cuts`."""
    out: Arrangement = []
    for digits in arrangement:
        axis, _, extent = digits[0]
        parts = split(extent, cuts.get(axis, []))
        assert parts is not None and len(digits) == 1
        out += [((axis, math.prod(parts[j + 1 :]), n),) for j, n in enumerate(parts)]
    return out


def fixed(op: Op) -> frozenset[int]:
    """Axes that a core has exactly one of."""
    if isinstance(op, Attention):
        return frozenset((op.column, E.CORE_AXIS, E.CORE_AXIS + 1))
    return frozenset() if op.row is None else frozenset((op.row,))


def reindex(g: Graph, op: Op, arrangement: Arrangement) -> Op:
    """`op` over the axes of the arrangement; fixed axes must stay whole. Raises `NotAffine`."""
    if arrangement == identity(op):
        return op
    new: dict[tuple[Digit, ...], tuple[int, int]] = {}  # -> id and extent
    domain: list[int] = []
    core: dict[str, int] = {}
    k_axes = op.k_axes if isinstance(op, Contract) else frozenset()
    for digits in arrangement:
        axis, extent = digits[0][0], math.prod(n for _, _, n in digits)
        if axis < len(op.domain):
            new[digits] = (len(domain), extent)
            domain.append(extent)
        elif axis in fixed(op):
            new[digits] = (axis, extent)
        else:
            kind, base = ("k", E.CORE_AXIS) if axis in k_axes else ("append", APPEND_AXIS)
            new[digits] = (base + core.setdefault(kind, 0), extent)
            core[kind] += 1
    mapping = _mapping(op, arrangement, new)
    memo: dict[Expr, Expr] = {}

    def expr(e: Expr) -> Expr:
        return E.substitute_axes(e, mapping, memo)

    def coords(cs: Iterable[Coord]) -> tuple[Coord, ...]:
        return tuple(E.coord_substitute(c, mapping, expr) for c in cs)

    def axes(old: Iterable[int]) -> list[tuple[int, int]]:
        """The new axes (id, extent) made of `old` ones, in the order of the arrangement."""
        wanted = frozenset(old)
        return [new[d] for d in arrangement if any(x[0] in wanted for x in d)]

    def ids(old: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a for a, _ in axes(old))

    def append(a: Append) -> Append:
        both = axes(a.axes)
        return replace(a, window=tuple(n for _, n in both), axes=tuple(x for x, _ in both), expr=expr(a.expr),
                       coords=coords(a.coords))  # fmt: skip

    store: tuple[Coord, ...] | None = coords(loops.identity(op))
    if store == tuple(E.coord_axis(a, n) for a, n in enumerate(domain)) and not isinstance(op, Sort):
        store = None
    out = replace(op, domain=tuple(domain), store=store)
    if isinstance(out, Update):
        return replace(out, store=None, append=append(out.append))
    out = out.with_exprs({r: expr(e) for r, e in op.exprs().items()})
    if isinstance(out, Contract):
        out = replace(out, k=tuple(axes(a for a, _ in out.k)))
    if isinstance(op, Attention):
        assert isinstance(out, Attention)
        out = replace(out, appends=tuple(append(a) for a in op.appends))
    return with_accumulators(out.renamed(ids))


def _mapping(op: Op, arrangement: Arrangement, new: dict[tuple[Digit, ...], tuple[int, int]]) -> dict[int, Coord]:
    """Every old axis as a coordinate over the new ones."""
    out = {d[0][0]: Coord() for d in identity(op)}
    for digits in arrangement:
        axis, _ = new[digits]
        after = 1
        for n, (old, step, extent) in reversed(list(enumerate(digits))):
            if extent > 1:
                term = Term(step, axis, after, extent if n else 0, extent)
                out[old] = E.coord_add(out[old], Coord(0, (term,)))
            after *= extent
    return out


def with_accumulators(op: Op) -> Op:
    """`op` with the axes of its accumulators brought up to date."""
    exprs = op.exprs()
    if "epilogue" not in exprs:
        return op
    axes: dict[str, Iterable[int]] = {"epilogue": range(len(op.domain))}
    if isinstance(op, Attention):
        axes |= dict.fromkeys(("score", "prob"), (*op.batch, *op.rows, E.CORE_AXIS + 1))
    return op.with_exprs({r: _with_axes(exprs[r], frozenset(a)) for r, a in axes.items()})


def _with_axes(e: Expr, axes: frozenset[int]) -> Expr:
    old = [x for x in E.walk(e) if isinstance(x, E.Acc) and x.axes != axes]
    return replace_nodes(e, {x: E.acc(x.index, axes, x.dtype) for x in old}) if old else e


def replace_nodes(e: Expr, table: dict[Expr, Expr]) -> Expr:
    """`e` with nodes replaced. A replacement must bind no axes, and mean the same at any depth."""
    memo = dict(table)

    def go(x: Expr) -> Expr:
        hit = memo.get(x)
        if hit is None:
            memo[x] = hit = E.rebuild(x, go, coord)
        return hit

    def coord(c: Coord) -> Coord:
        return c if c.dyn is None else Coord(c.const, c.terms, go(c.dyn), c.limit)

    return go(e)


# -------------------------------------------------------------------------------------------------------------- merging


def linear(g: Graph, exprs: Iterable[Expr]) -> Iterator[Coord]:
    """Every coordinate that must stay linear when axes merge (the axes of pieces do not merge at all)."""
    for e in exprs:
        for x in E.walk(e):
            if isinstance(x, E.Load):
                yield loops.address(g.values[x.value], x.coords)
                yield from (c for c in x.coords if c.dyn is not None)
            elif isinstance(x, E.Index):
                yield x.coord


def mergeable(coords: list[Coord], outer: int, inner: int, extent: int) -> bool:
    """Whether all coordinates are linear in `outer * extent + inner`."""
    for c in coords:
        a = b = 0
        for t in c.terms:
            if t.axis == outer:
                a = t.coef
            elif t.axis == inner:
                b = t.coef
        if a != b * extent:
            return False
    return True


def pieces(exprs: Iterable[Expr]) -> frozenset[int]:
    """The axes that concatenations are decided by."""
    return frozenset(t.axis for e in exprs for x in E.walk(e) if isinstance(x, E.Piece) for t in x.coord.terms)


def merged(g: Graph, op: Op) -> Arrangement:
    """Axes of extent 1 dropped, and neighbours in one role merged where all uses allow."""
    axes = loops.loop_axes(op)
    exprs = list(op.exprs().values())
    long = [x.role for x in axes if x.extent > 1]
    coords = list(linear(g, exprs)) if len(set(long)) < len(long) else []  # else there are no neighbours in a role
    appends = op.appends if isinstance(op, Attention) else (op.append,) if isinstance(op, Update) else ()
    for a in appends:
        coords += [loops.address(g.values[a.out], a.coords), *(c for c in a.coords if c.dyn is not None)]
    if not isinstance(op, Update):
        coords.append(loops.address(g.values[op.out], loops.identity(op)))
    alone = pieces(exprs) | fixed(op)
    sets = [frozenset(a.axes) for a in appends]
    groups: list[list[loops.LoopAxis]] = []
    for x in axes:
        if x.extent == 1 and x.axis not in fixed(op) and _droppable(op, x, axes):
            continue
        last = groups[-1][-1] if groups else None
        if (last is not None and last.role == x.role and x.role != "append" and x.extent < LONG
                and x.axis not in alone and last.axis not in alone
                and math.prod(y.extent for y in groups[-1]) * x.extent <= MAX_EXTENT
                and all((x.axis in s) == (last.axis in s) for s in sets)
                and mergeable(coords, last.axis, x.axis, x.extent)):  # fmt: skip
            groups[-1].append(x)
        else:
            groups.append([x])
    order = {d[0][0]: n for n, d in enumerate(identity(op))}
    groups.sort(key=lambda xs: order[xs[0].axis])
    return [tuple((x.axis, 1, x.extent) for x in xs) for xs in groups]


def _droppable(op: Op, x: loops.LoopAxis, axes: Iterable[loops.LoopAxis]) -> bool:
    """A contraction keeps one axis a role, if it has any."""
    if not isinstance(op, Contract):
        return True
    same = [y for y in axes if y.role == x.role]
    return x.role == "batch" or any(y.extent > 1 for y in same) or x is not same[0]


def merge_bound(g: Graph, r: E.Reduce, name: Callable[[], int]) -> E.Reduce:
    """The reduction with neighbouring bound axes merged where its body allows."""
    if len(r.bound) == 1:
        return r
    coords, alone = list(linear(g, (r.body,))), pieces((r.body,))
    groups: list[list[tuple[int, int]]] = []
    for a, n in zip(r.bound, r.extents, strict=True):
        last = groups[-1][-1][0] if groups else None
        if n == 1:
            continue
        fits = math.prod(m for _, m in groups[-1]) * n <= MAX_EXTENT if groups else False
        if last is not None and fits and a not in alone and last not in alone and mergeable(coords, last, a, n):
            groups[-1].append((a, n))
        else:
            groups.append([(a, n)])
    groups = groups or [[(r.bound[0], 1)]]
    if len(groups) == len(r.bound):
        return r
    mapping = {a: Coord() for a in r.bound}
    bound, extents = [], []
    for group in groups:
        axis, after = name(), 1
        for n, (a, extent) in reversed(list(enumerate(group))):
            if extent > 1:
                mapping[a] = Coord(0, (Term(1, axis, after, extent if n else 0, extent),))
            after *= extent
        bound.append(axis)
        extents.append(after)
    return E.reduce(r.op, E.substitute_axes(r.body, mapping), tuple(bound), tuple(extents))
