"""Where an expression reads and writes: accesses bound to slots, before registers are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax_mpk import abi
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Load
from jax_mpk.ir.graph import Graph, itemsize
from jax_mpk.ir.loops import Access, apart, flatten

ALIGN = 256
"""Constant offsets that are multiples of this many bytes go into the slot, so that layers of one array share code."""


@dataclass(frozen=True, eq=False)
class Place:
    """An access: `strides` by axis id, dynamic parts as (expression, limit, stride), everything in elements."""

    slot: int
    dtype: str
    offset: int
    strides: Mapping[int, int]
    dyn: tuple[tuple[Expr, int, int], ...] = ()

    def apart(self, box: Mapping[int, tuple[int, int]]) -> frozenset[int]:
        """The axes of a box along which points are different elements (`loops.apart`); those of one index are."""
        sizes = {a: hi - lo for a, (lo, hi) in box.items()}
        known = apart((a, s, sizes[a]) for a, s in self.strides.items() if sizes.get(a, 1) > 1)
        return known | {a for a, n in sizes.items() if n <= 1}

    @property
    def axes(self) -> frozenset[int]:
        """Every axis that the address depends on."""
        return frozenset(self.strides).union(*(e.axes for e, _, _ in self.dyn))


@dataclass
class Binder:
    """Numbers the values that one operator touches, in order of first use, and places its accesses.

    `slots` maps a value to its slot; `base[slot]` is the element offset that the binding of the slot takes over.
    """

    graph: Graph
    slots: dict[int, int] = field(default_factory=dict)
    base: list[int] = field(default_factory=list)
    _places: dict[Load, Place] = field(default_factory=dict)

    def load(self, x: Load) -> Place:
        hit = self._places.get(x)
        if hit is None:
            hit = self._places[x] = self.place(x.value, x.coords)
        return hit

    def place(self, value: int, coords: tuple[Coord, ...]) -> Place:
        v = self.graph.values[value]
        a = flatten(v, coords)
        slot = self.slots.get(value)
        if slot is None:
            slot = self.slots[value] = len(self.slots)
            # Where a piece begins late, the address of index 0 may lie outside of the buffer; a slot may not.
            shared = 0 < a.offset < v.size and a.offset * itemsize(v.dtype) % ALIGN == 0
            self.base.append(a.offset if shared else 0)
        strides = {axis: stride for axis, stride, _ in a.strides}
        return Place(slot, v.dtype, a.offset - self.base[slot], strides, _dynamic(a))


def total(c: Coord) -> Expr:
    """The value of a dynamic coordinate before it is clamped."""
    assert c.dyn is not None
    static = Coord(c.const, c.terms)
    return c.dyn if static == Coord() else E.binary("add", E.index(static), c.dyn)


def _dynamic(a: Access) -> tuple[tuple[Expr, int, int], ...]:
    dyn = [(total(d.coord), d.limit, d.stride) for d in a.dyn]
    if len(dyn) <= abi.MAX_DYN:
        return tuple(dyn)
    flat: Expr = E.const(0, "i32")  # more than an access can hold: the rest becomes one sum of clamped steps
    for e, limit, stride in dyn[abi.MAX_DYN - 1 :]:
        step = E.binary("max", E.binary("min", e, E.const(limit, "i32")), E.const(0, "i32"))
        flat = E.binary("add", flat, E.binary("mul", step, E.const(stride, "i32")))
    rest = sum(limit * stride for _, limit, stride in dyn[abi.MAX_DYN - 1 :])
    return (*dyn[: abi.MAX_DYN - 1], (flat, rest, 1))


def token(p: Place, number: Mapping[Expr, int]) -> tuple[object, ...]:
    """What is said about the access in the structural key of an operator."""
    dyn = tuple((number[e], limit, stride) for e, limit, stride in p.dyn)
    return p.slot, p.dtype, p.offset, tuple(p.strides.items()), dyn
