"""One operator with its tiles chosen and its values numbered: what a kind makes the operator's body with."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jax_mpk import abi
from jax_mpk.errors import MpkError
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Body, Nest, Store, nests, tokens
from jax_mpk.ir.expr import Acc, Expr
from jax_mpk.ir.graph import Append, Attention, Graph, Op, Update
from jax_mpk.ir.loops import LoopAxis, identity, loop_axes
from jax_mpk.ir.pieces import NotRefined
from jax_mpk.ir.place import Binder, Place, token, total

Lhs = tuple[tuple[object, ...], tuple[tuple[LoopAxis, int], ...], tuple[tuple[int, int], ...]]
"""The structure of a left side, its axes and tiles, and what it loads: values and offsets."""


@dataclass
class Bound:
    """axes, tile: the loop axes and elements of a task along each. binder: places of everything that is touched.
    key: the structure; operators with equal keys have equal bodies but for what their slots bind. lhs: what two
    contractions with the same activation have in common (structure of LHS, and what it loads)."""

    graph: Graph
    op: Op
    axes: tuple[LoopAxis, ...]
    tile: tuple[int, ...]
    binder: Binder
    key: tuple[object, ...]
    lhs: Lhs | tuple[()] = ()

    @functools.cached_property
    def number(self) -> dict[int, int]:
        """The loop axes in the order of the format."""
        return {x.axis: n for n, x in enumerate(self.axes)}

    @functools.cached_property
    def extent(self) -> dict[int, int]:
        return {x.axis: x.extent for x in self.axes}

    def roles(self, *roles: str) -> list[int]:
        """The axis ids of these roles, in the order of the roles."""
        return [x.axis for r in roles for x in self.axes if x.role == r]

    def scratch(self, slot: int, dtype: str, *roles: str) -> Place:
        """Scratch memory, row-major over the axes of these roles, of the lengths of a full tile."""
        length = {x.axis: min(x.extent, t) for x, t in zip(self.axes, self.tile, strict=True)}
        strides, step = {}, 1
        for a in reversed(self.roles(*roles)):
            strides[a] = step
            step *= max(1, length[a])
        return Place(slot, dtype, 0, {a: s for a, s in strides.items() if self.extent[a] > 1})

    def row_scratch(self, slot: int, dtype: str, axis: int) -> Place:
        """Scratch memory of one row along `axis`."""
        return Place(slot, dtype, 0, {axis: 1})

    def nests(self, e: Expr, axes: Iterable[int], store: Place | Store,
              acc: Mapping[int, Place] | None = None) -> tuple[Nest, ...]:  # fmt: skip
        """`e` over whole `axes`, stored; `acc`: where accumulators lie."""

        def place(x: E.Load | Acc) -> Place:
            if isinstance(x, E.Load):
                return self.binder.load(x)
            assert acc is not None, "an accumulator outside of an epilogue"
            return acc[x.index]

        ranges = {a: (0, self.extent[a]) for a in sorted(axes, key=self.number.__getitem__)}
        return nests(e, store if isinstance(store, Store) else Store(store), ranges, place)

    def result(self) -> Place:
        return self.binder.place(self.op.out, identity(self.op))

    def append(self, a: Append) -> tuple[Nest, ...]:
        """The stores of an update in place; those that are out of bounds are dropped where it says so."""
        place = self.binder.place(a.out, a.coords)
        where: Expr | None = None
        shape = self.graph.values[a.out].shape
        for c, n in zip(a.coords, shape, strict=True):
            if a.oob == "drop" and c.dyn is not None:
                at, low, high = total(c), E.const(0, "i32"), E.const(n - 1, "i32")
                inside = E.binary("and", E.binary("le", low, at), E.binary("le", at, high))
                where = inside if where is None else E.binary("and", where, inside)
        return self.nests(a.expr, a.axes, Store(place, where, a.mode))

    def core(self, out: Body, name: str, e: Expr) -> None:
        """An operand that the core itself reads, as parameter `name`."""
        if not isinstance(e, E.Load):
            raise NotRefined(f"{name} is {e}, not a load")
        self.core_place(out, name, self.binder.load(e))

    def core_place(self, out: Body, name: str, p: Place) -> None:
        if p.dyn:
            raise NotRefined(f"{name} has a dynamic coordinate")
        out.cores[name] = p

    def counts(self, out: Body, **roles: str) -> None:
        """How many axes have a role, as parameters."""
        out.params |= {name: len(self.roles(role)) for name, role in roles.items()}


def bind(graph: Graph, op: Op, tile: tuple[int, ...]) -> Bound:
    """Numbers the values of `op`, and makes its structural key: everything that its body depends on."""
    axes = loop_axes(op)
    if len(axes) > abi.MAX_AXES:
        raise MpkError(f"{op.kind} with {len(axes)} loop axes, there may be {abi.MAX_AXES} (from {op.source})")
    binder = Binder(graph)
    number: dict[Expr, int] = {}
    key: list[tuple[object, ...]] = []
    lhs: Lhs | tuple[()] = ()
    for role, e in op.exprs().items():
        key += tokens(binder.load, e, number)
        key.append((role, number[e]))
        if role == "lhs":
            own = tuple((x, t) for x, t in zip(axes, tile, strict=True) if x.role != "n")
            others = ("n", len(axes) - len(own))  # the axes of k are numbered after them
            lhs = ((*key, others), own, tuple(zip(binder.slots, binder.base, strict=True)))
    for s in _places(binder, op):
        for e, _, _ in s.dyn:
            key += tokens(binder.load, e, number)
        key.append(token(s, number))
    return Bound(graph, op, axes, tile, binder, (op.kind, axes, tile, _fields(graph, op), tuple(key)), lhs)


def _fields(graph: Graph, op: Op) -> tuple[object, ...]:
    """What else an operator consists of, besides axes, expressions and places."""
    appends = op.appends if isinstance(op, Attention) else (op.append,) if isinstance(op, Update) else ()
    own = tuple(getattr(op, f) for f in op.details)
    return own + tuple((a.axes, a.window, a.mode, a.oob, graph.values[a.out].shape) for a in appends)


def _places(binder: Binder, op: Op) -> Iterable[Place]:
    """The places of all stores."""
    if isinstance(op, Update):
        yield binder.place(op.append.out, op.append.coords)
        return
    for a in op.appends if isinstance(op, Attention) else ():
        yield binder.place(a.out, a.coords)
    yield binder.place(op.out, identity(op))
