"""Expressions as CUDA C++ statements: one constant a node, operands first, and the addresses of loads and stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cuda.space import Lines, Scratch, Space
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Nest, depends
from jax_mpk.ir.coord import Coord
from jax_mpk.ir.expr import Acc, Const, Expr, Index, Load
from jax_mpk.ir.opcodes import alias, opcode
from jax_mpk.ir.place import Place

Names = Mapping[Expr, str]
"""C++ names of nodes that are computed already; every name is a `u32` with the bits of the value."""


def bits(e: Const) -> int:
    """The 32 bits of a constant."""
    if e.dtype == "f32":
        with np.errstate(over="ignore"):
            return int(np.float32(e.value).view(np.uint32))
    return int(e.value) & 0xFFFFFFFF


def value_of(nest: Nest) -> Expr:
    """What a nest computes before the store, which rounds to its own type."""
    rounds = f"round_{nest.store.place.dtype}" if nest.store.mode == "set" else ""
    return alias(nest.value.a if isinstance(nest.value, E.Unary) and nest.value.op == rounds else nest.value)


def roots_of(nest: Nest) -> list[Expr]:
    """The value, where it is stored, and the dynamic coordinates of the store, as statements compute them."""
    return [value_of(nest), *(alias(e) for e in nest.roots[1:])]


@dataclass
class Printer:
    """What the statements of one nest are printed with. number: loop axes by id. scratch: where the slots of scratch
    live. static: C++ text of the axes that no loop runs over. names: of the axes of reductions."""

    nest: Nest
    number: Mapping[int, int]
    space: Space
    scratch: Mapping[int, Scratch]
    out: Lines
    static: dict[int, str] = field(default_factory=dict)
    bound: dict[int, str] = field(default_factory=dict)
    count: int = 0

    # ------------------------------------------------------------------------------------------------------- structure

    def args(self, x: Expr) -> tuple[Expr, ...]:
        return tuple(alias(a) for a in self.nest.args(x))

    def order(self, roots: Iterable[Expr], known: Iterable[Expr] = ()) -> list[Expr]:
        """The nodes below the roots that are not known, operands first. Bodies of reductions are not entered."""
        seen: set[Expr] = set(known)
        out: list[Expr] = []
        stack = [(r, False) for r in reversed(list(roots))]
        while stack:
            x, done = stack.pop()
            if done:
                out.append(x)
            elif x not in seen:
                seen.add(x)
                stack.append((x, True))
                if not isinstance(x, E.Reduce):
                    stack += [(a, False) for a in reversed(self.args(x))]
        return out

    def depends(self, x: Expr, known: dict[Expr, frozenset[int]]) -> frozenset[int]:
        """The axes that the value of `x` depends on."""
        return depends(self.nest, x, self.args, known)

    # ------------------------------------------------------------------------------------------------------ statements

    def define(self, x: Expr, names: dict[Expr, str]) -> str:
        """Prints `x`, whose operands have names, and gives it one."""
        if isinstance(x, Const):
            names[x] = f"{bits(x):#x}u"
            return names[x]
        name = names[x] = f"v{self.count}"
        self.count += 1
        self.out(f"const u32 {name} = {self.text(x, names)};")
        return name

    def text(self, x: Expr, names: Names) -> str:
        if isinstance(x, Index):
            return f"(u32)({self.coordinate(x.coord)})"
        if isinstance(x, Load | Acc):
            pointer, at, dtype = self.element(self.nest.place(x), names)
            return f"load<{dtype}>({pointer}, {at})"
        operands = ", ".join(names[a] for a in self.args(x))
        if isinstance(x, E.Select):
            return f"SELECT({operands})"
        assert isinstance(x, E.Unary | E.Binary), x
        return f"{opcode(x)}({operands})"

    def block(self, nodes: Iterable[Expr], names: dict[Expr, str]) -> None:
        for x in nodes:
            self.define(x, names)

    def store(self, place: Place, names: Names, value: str, where: str = "") -> None:
        """The statement that stores; `value`, `where`: names."""
        pointer, at, dtype = self.element(place, names)
        if (mode := self.nest.store.mode) != "set":
            kind = "F" if "F" in dtype else "I" if dtype[0] == "I" or mode in ("add", "mul") else "U"
            value = f"{kind}_{mode.upper()}(load<{dtype}>({pointer}, {at}), {value})"
        self.out(f"{f'if ({where}) ' if where else ''}store<{dtype}>({pointer}, {at}, {value});")

    # ------------------------------------------------------------------------------------------------------- addresses

    def axis(self, a: int) -> str:
        """The C++ name of the index along an axis."""
        return self.bound[a] if a in self.bound else self.static.get(a, f"i{self.number[a]}")

    def coordinate(self, c: Coord) -> str:
        terms = {t.axis: t.coef for t in c.terms}
        return self.sum(terms, c.const, False, False)

    def sum(self, terms: Mapping[int, int], offset: int, relative: bool, wide: bool) -> str:
        """`offset + sum stride * index`; `relative`: to the first index of the tile; `wide`: beyond 31 bits."""
        parts = []
        for a, stride in terms.items():
            i = self.axis(a)
            if relative and a in self.number:
                low = self.space.lo(self.number[a])
                if i == low:
                    continue
                if low != "0":
                    i = f"({i} - {low})"
            if i != "0":
                parts.append(i if stride == 1 else f"{'(i64)' if wide else ''}{i} * {stride}")
        if offset or not parts:
            parts.append(str(offset))
        return " + ".join(parts)

    def element(self, p: Place, names: Names) -> tuple[str, str, str]:
        """Pointer, element index and dtype of a place."""
        dtype = p.dtype.upper()
        if p.slot >= abi.SLOT_ACT:
            m = self.scratch[p.slot]
            dtype = m.dtype or dtype
            if not m.length:
                return m.pointer, self.sum(p.strides, p.offset, True, False), dtype
            in_row = {a: a in self.number and self.number[a] in m.rows for a in p.strides}
            rows = {a: v // m.length for a, v in p.strides.items() if in_row[a]}
            columns = {a: v for a, v in p.strides.items() if not in_row[a]}
            row = self.sum(rows, p.offset // m.length, True, False)
            column = self.sum(columns, p.offset % m.length, True, False)
            row = row if m.row0 == "0" else f"{row} - {m.row0}"
            column = column if m.col0 == "0" else f"{column} - {m.col0}"
            return m.pointer, f"({row}) * {m.ld} + {column}", dtype
        at = self.sum(p.strides, p.offset, False, self.reach(p) >= 1 << 31)
        for e, limit, stride in p.dyn:
            at += f" + clamp_to({names[alias(e)]}, {limit}) * {stride}"
        return f"d.ptr[{p.slot}]", at, dtype

    def reach(self, p: Place) -> int:
        """The largest static element index, or more."""
        size: Callable[[int], int] = lambda a: self.space.extent[self.number[a]] if a in self.number else 1 << 20
        return sum(abs(v) * size(a) for a, v in p.strides.items()) + abs(p.offset)
