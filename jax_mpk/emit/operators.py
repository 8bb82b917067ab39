"""Operators: the codes of each role, core accesses, scratch layouts and parameters, as `jax_mpk.abi` lays them down.

Operators of equal structure (`key`) are compiled once: the layers of a model differ only in what their slots bind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jax_mpk import abi
from jax_mpk.emit import code
from jax_mpk.emit.code import Frame, Store
from jax_mpk.emit.pieces import NotRefined
from jax_mpk.emit.place import Binder, Place, token, total
from jax_mpk.emit.registers import Code, access
from jax_mpk.errors import MpkError
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Acc, Expr
from jax_mpk.ir.graph import Append, Attention, Graph, Op, Sort, Update
from jax_mpk.ir.loops import LoopAxis, identity, loop_axes
from jax_mpk.tasks import kind_of


@dataclass
class Compiled:
    """An operator without its bindings: records of codes by role, of core accesses, parameters by name, flags."""

    kind: str
    codes: dict[str, list[Code]] = field(default_factory=dict)
    accesses: list[bytes] = field(default_factory=list)
    params: dict[str, int] = field(default_factory=dict)
    flags: int = 0


@dataclass
class Bound:
    """One operator of one graph: its axes and tiles, and the places of everything that it touches."""

    graph: Graph
    op: Op
    axes: tuple[LoopAxis, ...]
    tile: tuple[int, ...]
    binder: Binder
    key: tuple
    lhs: tuple = ()
    """What two contractions with the same activation have in common: the structure of LHS, and what it loads."""


def bind(graph: Graph, op: Op, tile: tuple[int, ...]) -> Bound:
    """Numbers the values of `op`, and makes its structural key: everything that its codes depend on."""
    axes = loop_axes(op)
    if len(axes) > abi.MAX_AXES:
        raise MpkError(f"{op.kind} with {len(axes)} loop axes, there may be {abi.MAX_AXES} (from {op.source})")
    binder = Binder(graph)
    number: dict[Expr, int] = {}
    tokens: list[tuple] = []
    lhs: tuple = ()
    for role, e in op.exprs().items():
        tokens += _tokens(binder, e, number)
        tokens.append((role, number[e]))
        if role == "lhs":
            own = tuple((x, t) for x, t in zip(axes, tile, strict=True) if x.role != "n")
            lhs = (tuple(tokens), own, tuple(zip(binder.slots, binder.base, strict=True)))
    for s in _places(binder, op):
        for e, _, _ in s.dyn:
            tokens += _tokens(binder, e, number)
        tokens.append(token(s, number))
    return Bound(graph, op, axes, tile, binder, (op.kind, axes, tile, _fields(graph, op), tuple(tokens)), lhs)


def _tokens(binder: Binder, e: Expr, number: dict[Expr, int]) -> list[tuple]:
    """The nodes of `e` that have no number yet, as tuples that name operands by number and values by slot."""
    out: list[tuple] = []
    todo = [(e, False)]
    while todo:
        x, done = todo.pop()
        if x in number:
            continue
        args = tuple(d for d, _, _ in binder.load(x).dyn) if isinstance(x, E.Load) else x.args()
        if not done:
            todo.append((x, True))
            todo += [(a, False) for a in args if a not in number]
            continue
        number[x] = len(number)
        ids = tuple(number[a] for a in args)
        if isinstance(x, E.Load):
            out.append(("load", x.dtype, token(binder.load(x), number)))
        elif isinstance(x, E.Const):
            out.append(("const", *x.key[1:]))
        elif isinstance(x, E.Index):
            out.append(("index", x.coord))
        elif isinstance(x, E.Acc):
            out.append(("acc", x.index))
        elif isinstance(x, E.Piece):
            out.append(("piece", x.coord, x.bounds, ids))
        elif isinstance(x, E.Reduce):
            out.append(("reduce", x.op, x.bound, x.extents, ids))
        else:
            out.append((getattr(x, "op", "select"), x.dtype, ids))
    return out


def _fields(graph: Graph, op: Op) -> tuple:
    """What else an operator consists of, besides axes, expressions and places."""
    if isinstance(op, Sort):
        return op.payload, op.descending, op.count
    appends = op.appends if isinstance(op, Attention) else (op.append,) if isinstance(op, Update) else ()
    return tuple((a.axes, a.window, a.mode, a.oob, graph.values[a.out].shape) for a in appends)


def _places(binder: Binder, op: Op) -> Iterable[Place]:
    """The places of all stores."""
    if isinstance(op, Update):
        yield binder.place(op.append.out, op.append.coords)
        return
    for a in op.appends if isinstance(op, Attention) else ():
        yield binder.place(a.out, a.coords)
    yield binder.place(op.out, identity(op))


# ---------------------------------------------------------------------------------------------------------- compilation


def compile(b: Bound) -> Compiled:
    """The codes and parameters of an operator; raises `RegisterPressure`."""
    return kind_of(b.op).emit(Compiler(b), b.op)


class Compiler:
    """What a task kind compiles its operators with: places, codes, core accesses, scratch layouts."""

    def __init__(self, b: Bound):
        self.b = b
        self.number = {x.axis: n for n, x in enumerate(b.axes)}
        self.extent = {x.axis: x.extent for x in b.axes}
        self.length = {x.axis: min(x.extent, t) for x, t in zip(b.axes, b.tile, strict=True)}

    def new(self, kind: str) -> Compiled:
        """An empty operator of an ABI kind."""
        return Compiled(kind)

    def roles(self, *roles: str) -> list[int]:
        """The axis ids of these roles, in the order of the roles."""
        return [x.axis for r in roles for x in self.b.axes if x.role == r]

    def scratch(self, slot: int, dtype: str, *roles: str) -> Place:
        """Scratch memory, row-major over the axes of these roles, of the lengths of a full tile."""
        strides, step = {}, 1
        for a in reversed(self.roles(*roles)):
            strides[a] = step
            step *= max(1, self.length[a])
        return Place(slot, dtype, 0, {a: s for a, s in strides.items() if self.extent[a] > 1})

    def row_scratch(self, slot: int, dtype: str, axis: int) -> Place:
        """Scratch memory of one row along `axis`."""
        return Place(slot, dtype, 0, {axis: 1})

    def code(self, e: Expr, axes: Iterable[int], store: Place | Store,
             acc: dict[int, Place] | None = None) -> list[Code]:  # fmt: skip
        def accumulator(x: Acc) -> Place:
            assert acc is not None, "an accumulator outside of an epilogue"
            return acc[x.index]

        frame = Frame(self.number, self.b.binder.load, accumulator)
        ranges = {a: (0, self.extent[a]) for a in sorted(axes, key=self.number.__getitem__)}
        return code.compile(frame, e, store if isinstance(store, Store) else Store(store), ranges)

    def result(self) -> Place:
        return self.b.binder.place(self.b.op.out, identity(self.b.op))

    def append(self, a: Append) -> list[Code]:
        place = self.b.binder.place(a.out, a.coords)
        where: Expr | None = None
        shape = self.b.graph.values[a.out].shape
        for c, n in zip(a.coords, shape, strict=True):
            if a.oob == "drop" and c.dyn is not None:
                at, low, high = total(c), E.const(0, "i32"), E.const(n - 1, "i32")
                inside = E.binary("and", E.binary("le", low, at), E.binary("le", at, high))
                where = inside if where is None else E.binary("and", where, inside)
        return self.code(a.expr, a.axes, Store(place, where, a.mode))

    def core(self, out: Compiled, name: str, e: Expr) -> None:
        """A core access (an operand that the core itself reads) as parameter `name`."""
        if not isinstance(e, E.Load):
            raise NotRefined(f"{name} is {e}, not a load")
        self.core_place(out, name, self.b.binder.load(e))

    def core_place(self, out: Compiled, name: str, p: Place) -> None:
        if p.dyn:
            raise NotRefined(f"{name} has a dynamic coordinate")
        out.params[name] = len(out.accesses)
        out.accesses.append(access(p, self.number))

    def counts(self, out: Compiled, **roles: str) -> None:
        out.params |= {name: len(self.roles(role)) for name, role in roles.items()}
