"""Nests with reductions: a group of threads (a warp, or all consumers) takes an outer point at a time.

The outer axes are those that a reduction depends on. For each of their points: scalars in every thread, each reduction
across the group, operands first, and at the end the other axes, spread over the group, and the stores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jax_mpk.abi.launch import THREADS, WARPS
from jax_mpk.backends.cuda import keep
from jax_mpk.backends.cuda.expressions import Printer, roots_of
from jax_mpk.backends.cuda.nest import BATCH, LIGHT, Writer
from jax_mpk.backends.cuda.space import Loop
from jax_mpk.ir.expr import Const, Expr, Reduce
from jax_mpk.ir.opcodes import alias
from jax_mpk.ir.pieces import boxes

LONG = 16
"""Elements that a thread has in flight in a long reduction of little work."""


def grouped(w: Writer, p: Printer, loops: list[Loop]) -> None:
    """Appends the statements of a nest with reductions over these loops."""
    out, roots = w.out, roots_of(p.nest)
    depends: dict[Expr, frozenset[int]] = {}
    reduces = [x for x in p.order(roots) if isinstance(x, Reduce)]
    fixed = {p.number[a] for r in reduces for a in p.depends(r, depends) if a in p.number}
    inner = [x for x in loops if not fixed & set(x.axes) and x.most > 1]
    outer = [x for x in loops if x not in inner]
    points, most = math.prod(x.most for x in outer), math.prod(x.most for x in inner)
    work = max(most, *(math.prod(r.extents) for r in reduces))
    warp = -(-points // WARPS) * (work / 32 + 8) < points * (work / THREADS + 32)
    if any(w.collides(p.nest, x) for x in outer):
        warp = False  # the points one after the other: each has a reduction, and with it barriers
    out(f"const int points = {' * '.join(x.count for x in outer) or '1'};")
    index = w.warp(points) if warp else "BlockGroup::index()"
    out(f"for (int o = {index}; o < points; o += {'Warp' if warp else 'Block'}Group::count) {{")
    with w.scope():
        w.declare(outer, "o")
        _Point(w, p, inner, depends, *(("WarpGroup", 32) if warp else ("BlockGroup", THREADS))).run()
    out("}")


@dataclass
class _Point:
    """What a group does for one outer point. names: of what every thread has computed; kept: arrays of what a thread
    has for each of its inner points; before: which of these come before the first reduction."""

    w: Writer
    p: Printer
    inner: list[Loop]
    depends: dict[Expr, frozenset[int]]
    group: str
    size: int
    names: dict[Expr, str] = field(default_factory=dict)
    kept: dict[Expr, str] = field(default_factory=dict)
    carry: list[keep.Carried] = field(default_factory=list)
    before: list[Expr] = field(default_factory=list)

    def run(self) -> None:
        w, p, inner, roots = self.w, self.p, self.inner, roots_of(self.p.nest)
        axis = {n: a for a, n in p.number.items()}
        mine = frozenset(axis[a] for x in inner for a in x.axes)
        self.local = {x for x in p.order(roots) if p.depends(x, self.depends) & mine}
        self.turns = -(-math.prod(x.most for x in inner) // self.size)
        if inner and not any(w.collides(p.nest, x) for x in inner):
            whole = all(len(x.axes) == 1 and x.base == "0" and x.count == str(x.most) for x in inner)
            loops = [(axis[x.axes[0]], x.most) for x in inner] if whole else []
            self.carry = keep.carried(p, roots, self.local, loops, self.turns)
            self.kept = {c.here: f"c{n}" for n, c in enumerate(self.carry)}
            self.before = keep.early(p, roots, self.local, self.turns, self.kept)
            for name in self.kept.values():
                w.out(f"u32 {name}[{self.turns}];")
            self.kept |= {x: f"e{n}" for n, x in enumerate(self.before)}
        self.scalars([x for x in p.order(roots, self.kept) if x not in self.local])
        if inner:
            w.out("{")
            w.points(p, inner, lambda _: f"{self.group}::rank()", self.size, self.names, self.kept)
            w.out("}")
            return
        w.out(f"if ({self.group}::rank() == 0) {{")
        p.store(p.nest.store.place, self.names, self.names[roots[0]], w.where(p, self.names))
        w.out("}")

    def scalars(self, nodes: list[Expr]) -> None:
        """Computes nodes, operands first, in every thread."""
        for x in nodes:
            if x in self.names:
                continue
            if isinstance(x, Reduce):
                if self.before:
                    self.ahead()
                self.reduce(x)
            else:
                self.p.define(x, self.names)

    def ahead(self) -> None:
        """What the end needs of memory and not of a reduction, before the reductions: one wait for memory."""
        w, p, out, before, self.before = self.w, self.p, self.w.out, self.before, []
        self.scalars([x for x in p.order(before, self.names) if x not in self.local])
        for x in before:
            out(f"u32 {self.kept[x]}[{self.turns}];")
        out("#pragma unroll")
        out(f"for (int u = 0; u < {self.turns}; ++u) {{")
        out(f"const int q = {self.group}::rank() + u * {self.size};")
        out(f"if (q >= {' * '.join(x.count for x in self.inner)}) continue;")
        with w.scope():
            w.declare(self.inner, "q")
            here = dict(self.names)
            p.block(p.order(before, here), here)
            for x in before:
                out(f"{self.kept[x]}[u] = {here[x]};")
        out("}")

    def reduce(self, r: Reduce) -> None:
        """One reduction; its pieces one after the other, in order."""
        p, out, bound = self.p, self.w.out, frozenset(r.bound)
        parts = boxes(r.body, {a: (0, n) for a, n in zip(r.bound, r.extents, strict=True)})
        for _, body in parts:
            nodes = p.order([alias(body)], self.names)
            self.scalars([x for x in nodes if not p.depends(x, self.depends) & bound])
        p.bound |= {a: f"r{j}" for j, a in enumerate(r.bound)}
        dst = f"s{p.count}"
        p.count += 1
        out(f"u32 {dst};")
        for n, (box, body) in enumerate(parts):
            self.part(r, [box[a] for a in r.bound], alias(body), dst, n == 0)
        self.names[r] = dst

    def part(self, r: Reduce, ranges: list[tuple[int, int]], root: Expr, dst: str, first: bool) -> None:
        p, out, group, size = self.p, self.w.out, self.group, self.size
        carried = {c.there: self.kept[c.here] for c in self.carry if c.reduce is r}
        kind, dtype = r.op.upper(), r.body.dtype.upper()
        extreme = kind in ("ARGMAX", "ARGMIN")
        letter = "F" if dtype == "F32" else "U" if dtype in ("U32", "BOOL") and kind in ("MAX", "MIN") else "I"
        op, total = f"{kind}_{letter}", math.prod(hi - lo for lo, hi in ranges)
        nodes = p.order([root], self.names)
        out("{")
        out("u32 key = 0, best = ~0u;" if extreme else f"u32 x = {op}::first;")
        if carried:
            out("#pragma unroll")
            out(f"for (int u = 0; u < {-(-total // size)}; ++u) {{")
            out(f"const int e = {group}::rank() + u * {size};")
            out(f"if (e >= {total}) continue;")
        else:
            light = sum(not isinstance(x, Const) for x in nodes) <= LIGHT and total >= LONG * size
            out(f"#pragma unroll {LONG if light else BATCH}")
            out(f"for (int e = {group}::rank(); e < {total}; e += {size}) {{")
        rest = "e"
        for j, (lo, hi) in reversed(list(enumerate(ranges))):
            digit = rest if j == 0 else f"{rest} % {hi - lo}"
            out(f"const int r{j} = {lo} + {digit};")
            rest = f"({rest} / {hi - lo})"
        here = dict(self.names)
        p.block(nodes, here)
        for x, name in carried.items():
            out(f"{name}[u] = {here[x]};")
        if extreme:
            key = f"extreme_key<{dtype if dtype != 'BOOL' else 'U32'}, {str(kind == 'ARGMAX').lower()}>({here[root]})"
            out(f"better(key, best, {key}, (u32)r0);")
        else:
            out(f"x = {op}::op(x, {here[root]});")
        out("}")
        if extreme:
            out(f"{dst} = reduce_extreme<{group}>(key, best, w.sh->scratch);")
        else:
            out(f"x = reduce<{group}, {op}>(x, w.sh->scratch);")
            out(f"{dst} = x;" if first else f"{dst} = {op}::op({dst}, x);")
        out("}")
