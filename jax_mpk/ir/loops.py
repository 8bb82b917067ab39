"""Operators as loop nests: the order of an operator's loop axes, and its memory accesses as strides over them.

This is the bridge from expressions to boxes (which tasks touch which bytes) and to code. After the `refine` pass every
coordinate of every operator flattens; before it, `flatten` raises `NotAffine`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jax_mpk.ir import expr as E
from jax_mpk.ir.coord import Term, collect
from jax_mpk.ir.expr import Coord, Expr, NotAffine
from jax_mpk.ir.graph import HEAD_AXIS, KEY_AXIS, Append, Attention, Contract, Graph, Op, Update, Value
from jax_mpk.ir.text import coord_text


@dataclass(frozen=True)
class LoopAxis:
    """Loop axis of an operator: the expression axis id, its extent, and its role in the core.

    Roles: "row" (ROWS), "batch", "m", "n", "k" (CONTRACT), "batch", "rows", "column", "key", "head", "append"; of a core
    that takes one row at a time "batch", and last "row".
    """

    axis: int
    extent: int
    role: str


def loop_axes(op: Op) -> tuple[LoopAxis, ...]:
    """The loop axes in the order that the program format fixes (`jax_mpk.abi`)."""
    known = vars(op).get("_loop_axes")  # an operator does not change, and is asked often
    if known is None:
        vars(op)["_loop_axes"] = known = _loop_axes(op)
    return known


def _loop_axes(op: Op) -> tuple[LoopAxis, ...]:
    def domain(axes: tuple[int, ...], role: str) -> list[LoopAxis]:
        return [LoopAxis(a, op.domain[a], role) for a in axes]

    if isinstance(op, Contract):
        out = [x for role in ("batch", "m", "n") for x in domain(op.axes(role), role)]
        return (*out, *(LoopAxis(a, n, "k") for a, n in op.k))
    if isinstance(op, Attention):
        out = domain(op.batch, "batch") + domain(op.rows, "rows") + domain((op.column,), "column")
        out += [LoopAxis(KEY_AXIS, op.keys, "key"), LoopAxis(HEAD_AXIS, op.head, "head")]
        seen = {x.axis for x in out}
        for a in op.appends:
            for axis, n in zip(a.axes, a.window, strict=True):
                if axis not in seen:
                    seen.add(axis)
                    out.append(LoopAxis(axis, n, "append"))
        return tuple(out)
    if op.row is not None:
        return (*domain(tuple(a for a in range(len(op.domain)) if a != op.row), "batch"), *domain((op.row,), "row"))
    return tuple(domain(tuple(range(len(op.domain))), "row"))


@dataclass(frozen=True)
class Dyn:
    """A dynamic coordinate: `clamp(coord, 0, limit)` steps of `stride` elements, over a dimension of `extent`."""

    coord: Coord
    limit: int
    stride: int
    extent: int


@dataclass(frozen=True)
class Access:
    """Element address `offset + sum strides[axis]*i_axis + sum dyn`, in elements of the value."""

    value: int
    offset: int
    strides: tuple[tuple[int, int, int], ...]  # (axis id, stride, extent), zero strides absent
    dyn: tuple[Dyn, ...] = ()

    def stride(self, axis: int) -> int:
        return next((s for a, s, _ in self.strides if a == axis), 0)


@functools.lru_cache(1024)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a dense array."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def address(value: Value, coords: tuple[Coord, ...]) -> Coord:
    """The static part of an element address; digits that together are a whole axis have merged."""
    static = tuple([c if c.dyn is None else _NOWHERE for c in coords])
    return _address(value.shape, static)


_NOWHERE = Coord()


@functools.lru_cache(1 << 14)
def _address(shape: tuple[int, ...], coords: tuple[Coord, ...]) -> Coord:
    const, terms = 0, []
    for c, stride in zip(coords, row_major(shape), strict=True):
        const += c.const * stride
        terms += [Term(t.coef * stride, t.axis, t.div, t.mod, t.extent) for t in c.terms]
    return collect(const, terms)


def flatten(value: Value, coords: tuple[Coord, ...]) -> Access:
    """The access of `value` at `coords`; raises `NotAffine` when a digit of an axis remains."""
    flat = address(value, coords)
    strides = []
    for t in flat.terms:
        if t.div != 1 or t.mod:
            raise NotAffine(f"{value} at {coord_text(flat, str)}")
        strides.append((t.axis, t.coef, t.extent))
    dyn = []
    if any([c.dyn is not None for c in coords]):
        for c, stride, extent in zip(coords, row_major(value.shape), value.shape, strict=True):
            if c.dyn is not None:
                dyn.append(Dyn(c, c.limit, stride, extent))
    return Access(value.id, flat.const, tuple(strides), tuple(dyn))


def apart(strides: Iterable[tuple[int, int, int]]) -> frozenset[int]:
    """Of axes (id, stride, extent) of an address those along which different indices are different addresses, whatever
    the indices along the others. All others together may name one address twice."""
    groups: list[tuple[list[int], int, int]] = []  # axes, common divisor of their strides, what is reached below them
    reach = 1
    for axis, stride, n in sorted(strides, key=lambda x: abs(x[1])):
        axes, step, below = [axis], abs(stride), reach
        while groups and step < below:
            others, divisor, below = groups.pop()
            axes, step = others + axes, math.gcd(step, divisor)
        groups.append((axes, step, below))
        reach += abs(stride) * (n - 1)
    return frozenset(axes[0] for axes, step, _ in groups if len(axes) == 1 and step)


def identity(op: Op) -> tuple[Coord, ...]:
    """The coordinates of `out` at a point of the domain."""
    return op.store if op.store is not None else tuple(E.coord_axis(a, n) for a, n in enumerate(op.domain))


def stores(g: Graph, op: Op) -> Iterator[tuple[str, Access, Append | None]]:
    """Every store: the role of the expression stored, the access, and the `Append` behind it if it is in place."""
    if isinstance(op, Update):
        yield "expr", flatten(g.values[op.append.out], op.append.coords), op.append
        return
    for j, a in enumerate(op.appends if isinstance(op, Attention) else ()):
        yield f"append{j}.expr", flatten(g.values[a.out], a.coords), a
    role = "expr" if "expr" in op.exprs() else "key" if op.kind == "sort" else "epilogue"
    yield role, flatten(g.values[op.out], identity(op)), None


def loads(g: Graph, op: Op) -> Iterator[tuple[str, Expr, Access, E.Ranges]]:
    """Every distinct load: role, the `Load`, its access, and the ranges to which pieces restrict its axes."""
    for role, e in op.exprs().items():
        for x, ranges in E.walk_loads(e):
            yield role, x, flatten(g.values[x.value], x.coords), ranges
