"""Pass `refine`: every operator becomes executable, which is to say that every coordinate flattens.

Axes are split where digits of them remain, merged again where all uses allow (longer loops), and dropped where their
extent is 1. What a core cannot read in place (its operands are plain strided accesses) is copied first; a reduction
inside a reduction, and an expression that needs too many registers, become operators of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from jax_mpk import abi
from jax_mpk.errors import UnsupportedError
from jax_mpk.ir import expr as E
from jax_mpk.ir import loops
from jax_mpk.ir.expr import Coord, Expr, Load, Piece, Reduce, Term
from jax_mpk.ir.graph import Attention, Contract, Graph, Map, Op, Source, Update, Value
from jax_mpk.kinds.bound import Bound, bind
from jax_mpk.passes import axes, digits
from jax_mpk.passes.reindex import cut, fixed, identity, merge_bound, merged, reindex, replace_nodes

SMALL = 40
"""Nodes of an operator that certainly fits the registers."""
MAX_BOUND = 4
"""Axes of a reduction in the program format."""


def run(graph: Graph, pressure: Callable[[Bound], str] | None = None) -> Graph:
    """The refined graph: `loops.flatten` never raises, and the constraints of `jax_mpk.abi` hold. `pressure` says why an
    operator is too much for the registers of the device, if it is."""
    r = _Refiner(graph, pressure)
    for op in graph.ops:
        r.refine(op)
    return graph.with_ops(r.ops, r.g.values)


def core_operands(op: Op) -> dict[str, Load]:
    """The loads that the core of an operator streams, by role."""
    if isinstance(op, Contract):
        return {f"rhs{j}": r for j, r in enumerate(op.rhs)}  # type: ignore[misc]
    return {"k": op.k, "v": op.v} if isinstance(op, Attention) else {}  # type: ignore[dict-item]


class _Refiner:
    def __init__(self, graph: Graph, pressure: Callable[[Bound], str] | None):
        self.pressure = pressure
        self.g = replace(graph, values=dict(graph.values))  # new temporaries are added as they are made
        self.ops: list[Op] = []
        self.next = max(graph.values, default=0) + 1
        self.copies: dict[tuple[Expr, tuple[int, ...]], int] = {}
        self.fresh = itertools.count(1 << 24)
        self.fits: set[tuple[object, ...]] = set()  # structures that are known to fit the registers

    def refine(self, op: Op) -> None:
        """Appends `op`, made executable, after the operators that it needs for that."""
        if not self.ready(op):
            op = self.bound_axes(self.nested(op))
            op = self.split(self.operands(op))
        op = reindex(self.g, op, merged(self.g, op))
        op = self.contiguous(op)
        self.ops.append(self.fit(op))

    # ------------------------------------------------------------------------------------------------------ materialise

    def materialise(self, e: Expr, extent: Mapping[int, int], source: Source, order: Iterable[int] = (),
                    whole: AbstractSet[int] = frozenset()) -> Load:  # fmt: skip
        """A load of `e` from a temporary over the axes of `e` (`order` first), which a new map computes before.

        Axes of `order` that are in `whole` are stored out even where `e` repeats itself along them.
        """
        over = [a for a in order if a in e.axes or (a in whole and extent[a] > 1)]
        over += sorted(e.axes - frozenset(over))
        shape = tuple(extent[a] for a in over)
        point = {a: E.coord_axis(d, n) for d, (a, n) in enumerate(zip(over, shape, strict=True))}
        body = digits.clamped(self.g.values, E.substitute_axes(e, point))
        value = self.copies.get((body, shape))
        if value is None:
            value, self.next = self.next, self.next + 1
            self.g.values[value] = Value(value, shape, self.storage(e))
            self.refine(Map(value, shape, source, None, body))
            self.copies[body, shape] = value
        coords = tuple(E.coord_axis(a, n) for a, n in zip(over, shape, strict=True))
        return E.load(value, coords, e.dtype)

    def storage(self, e: Expr) -> str:
        """The smallest type in memory that holds `e` exactly, as far as it shows."""
        if isinstance(e, Load):
            return self.g.values[e.value].dtype
        if isinstance(e, E.Unary) and e.op in ("round_bf16", "round_f16"):
            return e.op[6:]
        return e.dtype

    def nested(self, op: Op) -> Op:
        """Reductions that depend on the axes of a reduction around them become maps of their own."""
        for role, e in op.exprs().items():
            while e.height > 1:
                found = _nested(e, {x.axis: x.extent for x in loops.loop_axes(op)})
                if found is None:
                    break
                outer, inner, extent = found
                body = replace_nodes(outer.body, {inner: self.materialise(inner, extent, op.source)})
                e = replace_nodes(e, {outer: E.reduce(outer.op, body, outer.bound, outer.extents)})
                op = op.with_exprs({role: e})
        return op

    def fit(self, op: Op) -> Op:
        """Splits off subexpressions until the registers suffice."""
        self.check_axes(op)
        while self.pressure is not None and sum(1 for e in op.exprs().values() for _ in E.walk(e)) > SMALL:
            extent = {x.axis: x.extent for x in loops.loop_axes(op)}
            bound = bind(self.g, op, tuple(extent.values()))
            if bound.key in self.fits:
                break
            error = self.pressure(bound)
            if not error:
                self.fits.add(bound.key)
                break
            role, part = _half(op, frozenset(extent), error)
            every = extent | _bound_extents(op.exprs()[role])
            rest = replace_nodes(op.exprs()[role], {part: self.materialise(part, every, op.source)})
            op = op.with_exprs({role: rest})
        return op

    def check_axes(self, op: Op) -> None:
        bound = max((len(x.bound) for e in op.exprs().values() if e.height for x in E.walk(e) if isinstance(x, Reduce)),
                    default=0)  # fmt: skip
        if (n := len(loops.loop_axes(op)) + bound) > abi.MAX_AXES:
            raise _unsupported(op, f"{n} loop axes, there may be {abi.MAX_AXES}")

    # ------------------------------------------------------------------------------------------------------- bound axes

    def bound_axes(self, op: Op) -> Op:
        """Reductions over axes without digits, as few as possible."""
        out = {}
        for role, e in op.exprs().items():
            if e.height:
                table: dict[Expr, Expr] = {}
                out[role] = self._reductions(e, table)
        return op.with_exprs(out) if out else op

    def _reductions(self, e: Expr, memo: dict[Expr, Expr]) -> Expr:
        def go(x: Expr) -> Expr:
            if not x.height:
                return x
            hit = memo.get(x)
            if hit is None:
                hit = E.rebuild(x, go, coord)
                memo[x] = hit = self._bound(hit) if isinstance(hit, Reduce) else hit
            return hit

        def coord(c: Coord) -> Coord:
            return c if c.dyn is None else Coord(c.const, c.terms, go(c.dyn), c.limit)

        return go(e)

    def _bound(self, r: Reduce) -> Expr:
        values, single = self.g.values, r.op in ("argmax", "argmin")
        if single:  # a reduction in several ranges would lose the index
            body = digits.plain_pieces(values, r.body, lambda x: not x.coord.axes().isdisjoint(r.bound))
            r = self._reduce(r, body, r.bound, r.extents)
        extent = dict(zip(r.bound, r.extents, strict=True))
        cuts = digits.choose(digits.addresses(values, r.body), extent, frozenset(r.bound) if single else frozenset())
        r = self._cut(r, cuts)
        r = merge_bound(self.g, r, lambda: next(self.fresh))
        while len(r.bound) > MAX_BOUND:  # the two first axes as one, their digits computed
            (a, b), (n, m), new = r.bound[:2], r.extents[:2], next(self.fresh)
            pair = {a: Coord(0, (Term(1, new, m, 0, n),)), b: Coord(0, (Term(1, new, 1, m, m),))}
            r = self._reduce(r, E.substitute_axes(r.body, pair), (new, *r.bound[2:]), (n * m, *r.extents[2:]))
            r = self._cut(r, {})
        return r

    def _cut(self, r: Reduce, cuts: Mapping[int, list[int]]) -> Reduce:
        extent = dict(zip(r.bound, r.extents, strict=True))
        body = _affine(self.g.values, r.body, cuts, extent)
        mapping: dict[int, Coord] = {}
        bound: list[int] = []
        extents: list[int] = []
        for a, n in extent.items():
            parts = axes.split(n, cuts.get(a, []))
            assert parts is not None
            ids = [next(self.fresh) for _ in parts]
            flat, step = Coord(), 1
            for i, m in reversed(list(zip(ids, parts, strict=True))):
                flat = E.coord_add(flat, E.coord_scale(E.coord_axis(i, m), step))
                step *= m
            mapping[a] = flat
            bound += ids
            extents += parts
        return self._reduce(r, E.substitute_axes(body, mapping), tuple(bound), tuple(extents))

    def _reduce(self, r: Reduce, body: Expr, bound: tuple[int, ...], extents: tuple[int, ...]) -> Reduce:
        return E.reduce(r.op, body, bound, extents)

    # -------------------------------------------------------------------------------------------------------- free axes

    def ready(self, op: Op) -> bool:
        """Whether nothing but merging of axes is left to do: the common case, decided quickly."""
        values = self.g.values
        if any(isinstance(x, Piece) for r, e in op.exprs().items() if _places(r) for x in E.walk(e)):
            return False
        for e in op.exprs().values():
            if e.height > 1 or digits.has_digits(values, e):
                return False
            for x in E.walk(e):
                if isinstance(x, Reduce) and (len(x.bound) > 1 or x.op.startswith("arg")):
                    return False
                if isinstance(x, Piece) and not (len(x.coord.terms) == 1 and x.coord.terms[0].coef == 1):
                    return False
        if any(c.dyn is not None for x in core_operands(op).values() for c in x.coords):
            return False
        return not any(digits.is_digit(t) for value, c in _stores(op) for t in loops.address(values[value], c).terms)

    def operands(self, op: Op) -> Op:
        """Copies the operands of a core that are no plain strided accesses over its axes."""
        extent = {x.axis: x.extent for x in loops.loop_axes(op)}
        cuts = self.cuts(op)
        for role, x in core_operands(op).items():
            terms = [t for c in x.coords for t in c.terms]
            whole = all(digits.plain_after(t, cuts, extent) for t in terms)
            if isinstance(op, Attention):
                whole &= not any(digits.is_digit(t) and t.axis in fixed(op) for t in terms)
            if not whole or any(c.dyn is not None for c in x.coords):
                op = self.copied(op, role)
        return op

    def copied(self, op: Op, role: str) -> Op:
        """`op` with the operand `role` read from a dense copy."""
        x = core_operands(op)[role]
        if isinstance(op, Attention) and x.loads & {a.out for a in op.appends}:
            op = self.detached(op)  # the copy must see what is appended
        names = ("batch", "k", "n") if isinstance(op, Contract) else ("batch", "key")
        order = [y.axis for r in names for y in loops.loop_axes(op) if y.role == r]
        extent = {y.axis: y.extent for y in loops.loop_axes(op)}
        # A core walks its n axes, and its k axes, by one stride each: a copy that leaves out a repeated one has two.
        whole = frozenset(y.axis for y in loops.loop_axes(op) if isinstance(op, Contract) and y.role in ("n", "k"))
        return op.with_exprs({role: self.materialise(x, extent, op.source, order, whole)})

    def detached(self, op: Attention) -> Attention:
        """`op` without its appends, which become updates before it."""
        for a in op.appends:
            mapping = {x: E.coord_axis(d, n) for d, (x, n) in enumerate(zip(a.axes, a.window, strict=True))}
            coords = tuple(E.coord_substitute(c, mapping, lambda e: E.substitute_axes(e, mapping)) for c in a.coords)  # noqa: B023
            new = replace(a, axes=tuple(range(len(a.window))), coords=coords, expr=E.substitute_axes(a.expr, mapping))
            self.refine(Update(a.out, a.window, op.source, None, new))
        return replace(op, appends=())

    def cuts(self, op: Op) -> dict[int, list[int]]:
        extent = {x.axis: x.extent for x in loops.loop_axes(op)}
        found = [(0, Coord(c.const, c.terms)) for _, cs in _stores(op) for c in cs]
        cores = core_operands(op)
        for role, e in op.exprs().items():
            found += [(1 if role in cores else rank, c) for rank, c in digits.addresses(self.g.values, e)]
        return digits.choose(found, extent, fixed(op))

    def split(self, op: Op) -> Op:
        """Splits the free axes where digits of them remain; digits that do not nest are computed."""
        extent = {x.axis: x.extent for x in loops.loop_axes(op)}
        cuts = self.cuts(op)
        for _, cs in _stores(op):
            if not all(digits.plain_after(t, cuts, extent) for c in cs for t in c.terms):
                raise _unsupported(op, "the index map of a result is not affine")
        cores = core_operands(op)
        exprs = {r: e for r, e in op.exprs().items() if r not in cores}
        op = op.with_exprs({r: _affine(self.g.values, e, cuts, extent) for r, e in exprs.items()})
        op = reindex(self.g, op, cut(identity(op), cuts))
        exprs = {r: e for r, e in op.exprs().items() if r not in cores}
        # All codes of a store have one place: what decides it chooses by selects, not by boxes of its own.
        every: Callable[[Piece], bool] = lambda _: True
        return op.with_exprs(
            {r: digits.plain_pieces(self.g.values, e, every if _places(r) else None) for r, e in exprs.items()}
        )

    def contiguous(self, op: Op) -> Op:
        """Orders the n and the k axes of a contraction like its operand; copies operands whose strides do not merge."""
        if not isinstance(op, Contract):
            return op
        if not all(self.merges(op, x) for x in core_operands(op).values()):
            access = loops.flatten(self.g.values[op.rhs[0].value], op.rhs[0].coords)  # type: ignore[attr-defined]
            role = {x.axis: x.role for x in loops.loop_axes(op)}
            order = identity(op)
            for r in ("n", "k"):
                places = [i for i, d in enumerate(order) if role[d[0][0]] == r]
                best = sorted((order[i] for i in places), key=lambda d: -abs(access.stride(d[0][0])))
                for i, d in zip(places, best, strict=True):
                    order[i] = d
            op = reindex(self.g, op, order)
            op = reindex(self.g, op, merged(self.g, op))
        apart = [name for name, x in core_operands(op).items() if not self.merges(op, x)]
        for name in apart:
            op = self.copied(op, name)
        return reindex(self.g, op, merged(self.g, op)) if apart else op

    def merges(self, op: Op, x: Load) -> bool:
        """Whether the strides of an operand over the n axes, and over the k axes, are those of one axis."""
        access = loops.flatten(self.g.values[x.value], x.coords)
        for role in ("n", "k"):
            over = [y for y in loops.loop_axes(op) if y.role == role]
            if any(access.stride(a.axis) != access.stride(b.axis) * b.extent for a, b in itertools.pairwise(over)):
                return False
        return True


def _places(role: str) -> bool:
    """Whether an expression is a coordinate of a store."""
    return role.rpartition(".")[2].startswith("at")


def _unsupported(op: Op, reason: str) -> UnsupportedError:
    return UnsupportedError(op.source.primitive, reason, where=op.source.where)


def _stores(op: Op) -> list[tuple[int, tuple[Coord, ...]]]:
    """The coordinates of every store, with the value."""
    if isinstance(op, Update):
        return [(op.append.out, op.append.coords)]
    appends = op.appends if isinstance(op, Attention) else ()
    return [*((a.out, a.coords) for a in appends), (op.out, loops.identity(op))]


def _affine(values: Mapping[int, Value], e: Expr, cuts: Mapping[int, list[int]], extent: Mapping[int, int]) -> Expr:
    """`e` with the digits computed that stay digits when the axes of `extent` are cut."""

    def bad(t: Term) -> bool:
        return not digits.plain_after(t, cuts, extent)

    if not any(bad(t) for _, c in digits.addresses(values, e) for t in c.terms):
        return e
    e = digits.plain_pieces(values, e, lambda x: any(map(bad, x.coord.terms)))
    return digits.compute_digits(values, e, bad)


def _nested(e: Expr, extent: Mapping[int, int]) -> tuple[Reduce, Reduce, dict[int, int]] | None:
    """A reduction, one inside it that depends on its axes, and the extents of all axes that are in scope there."""
    for outer in E.walk(e):
        if isinstance(outer, Reduce) and outer.height > 1:
            inside = [x for x in E.walk(outer.body) if isinstance(x, Reduce) and not x.axes.isdisjoint(outer.bound)]
            if inside and outer.axes <= frozenset(extent):
                return outer, inside[-1], dict(extent) | dict(zip(outer.bound, outer.extents, strict=True))
    return None


def _half(op: Op, axes_: frozenset[int], error: str) -> tuple[str, Expr]:
    """The role, and the part of its expression that is nearest to half of it and can be computed elsewhere.

    A part inside a reduction is one too (a recurrence of which the last state is summed), over its axes as well.
    """
    best: tuple[float, str, Expr] | None = None
    for role, e in op.exprs().items():
        nodes = list(E.walk(e))
        scope = axes_ | frozenset(_bound_extents(e))
        for x in nodes:
            if isinstance(x, E.Unary | E.Binary | E.Select | Reduce | Piece) and x.axes <= scope and x is not e:
                inside = list(E.walk(x))
                if not any(isinstance(y, E.Acc) for y in inside):
                    off = abs(2 * len(inside) - len(nodes)) - len(nodes) / 4
                    if best is None or off < best[0]:
                        best = (off, role, x)
    if best is None:
        raise _unsupported(op, error)
    return best[1], best[2]


def _bound_extents(e: Expr) -> dict[int, int]:
    """The extents of the axes that reductions in `e` bind, where all that bind an axis agree."""
    found: dict[int, set[int]] = {}
    for x in E.walk(e) if e.height else ():
        if isinstance(x, Reduce):
            for a, n in zip(x.bound, x.extents, strict=True):
                found.setdefault(a, set()).add(n)
    return {a: min(n) for a, n in found.items() if len(n) == 1}
