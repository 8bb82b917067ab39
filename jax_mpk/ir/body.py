"""Bodies: what a task does, as loop nests over expressions. Made once by the operator's kind, printed by every back end.

A *nest* evaluates an expression at every point of a box of loop axes and stores it. A *body* is the nests of an operator
by role (`abi.Role`), and what its core reads by itself. Nothing here knows registers, threads or instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Acc, Expr, Load
from jax_mpk.ir.pieces import Box, NotRefined, boxes
from jax_mpk.ir.place import Place, token


@dataclass(frozen=True)
class Store:
    """What becomes of the value: `mode` "set" or one of `abi.COMBINES`, only where `where` holds (None: everywhere)."""

    place: Place
    where: Expr | None = None
    mode: str = "set"


@dataclass(frozen=True, eq=False)
class Nest:
    """`value` at every point of `box` (axis id to range, in loop order), stored. No `Piece` over an axis of the box is
    left in it; those over the axes of its reductions are. `place`: where its loads and accumulators lie."""

    box: Box
    value: Expr
    store: Store
    place: Callable[[Load | Acc], Place]

    @property
    def roots(self) -> tuple[Expr, ...]:
        """Everything that is evaluated: the value, where it is stored, and the coordinates known at run time."""
        where = () if self.store.where is None else (self.store.where,)
        return self.value, *where, *(e for e, _, _ in self.store.place.dyn)

    def args(self, x: Expr) -> tuple[Expr, ...]:
        """What must be known before `x`; for a load that is its dynamic coordinates, complete with their offsets."""
        return tuple(e for e, _, _ in self.place(x).dyn) if isinstance(x, Load) else x.args()

    def walk(self) -> Iterator[Expr]:
        """Every node, bodies of reductions included, operands first."""
        seen: set[Expr] = set()
        stack = [(r, False) for r in reversed(self.roots)]
        while stack:
            x, done = stack.pop()
            if done:
                yield x
            elif x not in seen:
                seen.add(x)
                stack.append((x, True))
                stack += [(a, False) for a in self.args(x)]


def unknown(x: Expr, args: Callable[[Expr], Iterable[Expr]], known: Container[Expr]) -> Iterator[Expr]:
    """The nodes below and including `x` that are not in `known`, operands first; the caller makes each known."""
    stack = [x]
    while stack:
        y = stack[-1]
        if missing := [a for a in args(y) if a not in known]:
            stack += missing
            continue
        stack.pop()
        if y not in known:
            yield y


def depends(
    nest: Nest, x: Expr, args: Callable[[Expr], Iterable[Expr]], known: dict[Expr, frozenset[int]]
) -> frozenset[int]:
    """The axes that the value of `x` depends on; `known` grows by what is below it."""
    for y in unknown(x, args, known):
        out = frozenset().union(*(known[a] for a in args(y)))
        if isinstance(y, E.Index | E.Piece):
            out |= y.coord.axes()
        elif isinstance(y, Load | Acc):
            out |= nest.place(y).strides.keys()
        elif isinstance(y, E.Reduce):
            out -= frozenset(y.bound)
        known[y] = out
    return known[x]


def outside(roots: Iterable[Expr], args: Callable[[Expr], Iterable[Expr]]) -> list[Expr]:
    """The nodes below and including `roots` outside of the bodies of reductions."""
    seen: dict[Expr, None] = {}
    stack = list(roots)
    while stack:
        x = stack.pop()
        if x not in seen:
            seen[x] = None
            stack += () if isinstance(x, E.Reduce) else args(x)
    return list(seen)


@dataclass
class Body:
    """What a task of an operator does. kind: the ABI kind. nests: by role. cores: operands and results that the core
    reaches itself, by parameter. params: other parameters by name. in_place: the stores go to an operand."""

    kind: str
    nests: dict[str, tuple[Nest, ...]] = field(default_factory=dict)
    cores: dict[str, Place] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    in_place: bool = False


def nests(e: Expr, store: Store, extents: Box, place: Callable[[Load | Acc], Place]) -> tuple[Nest, ...]:
    """The nests that store `e` over the box `extents`: one for each combination of its pieces."""
    if store.mode != "set" and store.where is None:
        store = Store(store.place, E.const(True, "bool"), store.mode)
    others = [*(() if store.where is None else (store.where,)), *(d for d, _, _ in store.place.dyn)]
    if any(isinstance(x, E.Piece) for r in others for x in E.walk(r)):
        raise NotRefined("a store coordinate has pieces")
    return tuple(Nest(box, value, store, place) for box, value in boxes(e, extents))


# ------------------------------------------------------------------------------------------------------------ structure


def tokens(place: Callable[[Load], Place], e: Expr, number: dict[Expr, int]) -> list[tuple[object, ...]]:
    """The nodes of `e` that have no number yet, as tuples that name operands by number and values by slot: what two
    operators of equal structure have in common."""
    out: list[tuple[object, ...]] = []
    todo = [(e, False)]
    while todo:
        x, done = todo.pop()
        if x in number:
            continue
        args = tuple(d for d, _, _ in place(x).dyn) if isinstance(x, Load) else x.args()
        if not done:
            todo.append((x, True))
            todo += [(a, False) for a in args if a not in number]
            continue
        number[x] = len(number)
        ids = tuple(number[a] for a in args)
        if isinstance(x, Load):
            out.append(("load", x.dtype, token(place(x), number)))
        elif isinstance(x, E.Const):
            out.append(("const", *x.key[1:]))
        elif isinstance(x, E.Index):
            out.append(("index", x.coord))
        elif isinstance(x, Acc):
            out.append(("acc", x.index))
        elif isinstance(x, E.Piece):
            out.append(("piece", x.coord, x.bounds, ids))
        elif isinstance(x, E.Reduce):
            out.append(("reduce", x.op, x.bound, x.extents, ids))
        else:
            out.append((getattr(x, "op", "select"), x.dtype, ids))
    return out
