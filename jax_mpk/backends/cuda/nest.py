"""Nests as CUDA C++ with loops over their axes.

A nest without reductions is one flat loop over its points, a thread a point. With reductions (`grouped.py`), a group of
threads takes an outer point at a time. What several points compute comes before their stores, so that loads overlap.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from jax_mpk.abi.launch import THREADS, WARPS
from jax_mpk.backends.cuda import wide
from jax_mpk.backends.cuda.expressions import Printer, roots_of, value_of
from jax_mpk.backends.cuda.space import Lines, Loop, Scratch, Space, Span
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Nest
from jax_mpk.ir.expr import Acc, Const, Expr, Load
from jax_mpk.ir.opcodes import alias

BATCH = 4
"""Points a thread has in flight."""
LIGHT = 3
"""Nodes of a point of which a thread has `DEEP` in flight."""
DEEP = 8
WIDE = 8
"""bf16 elements of a 16-byte copy."""


class Writer:
    """Prints the nests of one function, one after the other. number: loop axes by id; aligned: the slots that start at
    multiples of 16 bytes."""

    def __init__(self, number: Mapping[int, int], space: Space, aligned: frozenset[int] = frozenset()):
        self.number, self.space, self.aligned = number, space, aligned
        self.out = Lines()
        self.turn: int | None = None
        """The warp that the next nest starts at, if nests are spread over the warps; else they all start at the first."""

    def nest(self, nest: Nest, scratch: Mapping[int, Scratch], spans: Sequence[Span] = ()) -> None:
        """Appends the statements of one nest. `scratch` maps slots, `spans` replaces ranges of axes."""
        from jax_mpk.backends.cuda.grouped import grouped

        self.guards: list[tuple[tuple[int, ...], Span]] = []
        self.declared: frozenset[int] = frozenset()
        p = self._printer(nest, scratch)
        loops = self._loops(p, spans)
        self.out("{")
        if any(isinstance(x, E.Reduce) for x in p.order(roots_of(nest))):
            grouped(self, p, loops)
        else:
            self._flat(p, loops)
        self.out("}")

    def everyone(self, nest: Nest, scratch: Mapping[int, Scratch]) -> None:
        """Appends the statements of a nest of one point, which every thread runs for itself."""
        p = self._printer(nest, scratch)
        p.static |= {a: self.space.lo(n) for a, n in self.number.items()}
        self.out("{")
        self._straight(p, {})
        self.out("}")

    def point(self, nest: Nest, at: Mapping[int, str], slot: int, name: str) -> None:
        """Appends the statements of a nest at one point: `at` gives coordinates by axis number (those of other axes are
        the tile's first), and the float `name` stands for the element of `slot`."""
        p = self._printer(nest, {})
        p.static |= {a: at.get(n, self.space.lo(n)) for a, n in self.number.items()}
        bounds = [(at[self.number[a]], *r, self.space.extent[self.number[a]]) for a, r in nest.box.items()
                  if self.number[a] in at]  # fmt: skip
        inside = [f"{i} >= {lo}" for i, lo, _, _ in bounds if lo > 0]
        inside += [f"{i} < {hi}" for i, _, hi, extent in bounds if hi < extent]
        self.out(f"if ({' && '.join(inside)}) {{" if inside else "{")
        here: dict[Expr, str] = {
            x: f"b({name})" for x in p.order(roots_of(nest)) if isinstance(x, Acc) and nest.place(x).slot == slot
        }
        self._straight(p, here, name)
        self.out("}")

    def _printer(self, nest: Nest, scratch: Mapping[int, Scratch]) -> Printer:
        static = {a: self.space.lo(n) for a, n in self.number.items() if a not in nest.box}
        return Printer(nest, self.number, self.space, scratch, self.out, static)

    def _straight(self, p: Printer, here: Mapping[Expr, str], name: str = "") -> None:
        names, roots = dict(here), roots_of(p.nest)
        p.block(p.order(roots, names), names)
        if name:
            self.out(f"{name} = f({names[roots[0]]});")
        else:
            p.store(p.nest.store.place, names, names[roots[0]], self.where(p, names))

    def where(self, p: Printer, names: Mapping[Expr, str]) -> str:
        return names[alias(p.nest.store.where)] if p.nest.store.where is not None else ""

    # ------------------------------------------------------------------------------------------------ threads and warps

    def thread(self, points: int) -> str:
        """The number of this thread in a nest of so many points; the next nest starts after them."""
        if self.turn is None:
            return "thread()"
        first, self.turn = self.turn, (self.turn + -(-points // 32)) % WARPS
        return f"thread({THREADS - 32 * first})" if first else "thread()"

    def warp(self, points: int) -> str:
        """The same for the warps."""
        if not self.turn:
            self.turn = None if self.turn is None else points % WARPS
            return "WarpGroup::index()"
        first, self.turn = self.turn, (self.turn + points) % WARPS
        return f"(WarpGroup::index() + {WARPS - first}) % {WARPS}"

    # ------------------------------------------------------------------------------------------------------------ loops

    def _loops(self, p: Printer, spans: Sequence[Span]) -> list[Loop]:
        """The loops over the box, the one along which memory is contiguous last (and fastest)."""
        s, taken, loops = self.space, set(), []
        box = {self.number[a]: r for a, r in p.nest.box.items()}
        inner = self._contiguous(p)
        alone = inner is not None and any(isinstance(x, E.Reduce) for x in p.order(roots_of(p.nest)))
        for span in spans:
            full = all(a not in box or (box[a][0] <= 0 and box[a][1] >= s.extent[a]) for a in span.axes)
            inside = [a for a in span.axes if a in box]
            if len(span.axes) == 1 and inside:
                a = span.axes[0]
                lo, hi = self._clip(a, box[a], f"({s.lo(a)} + ({span.lo}))", f"({s.lo(a)} + ({span.hi}))")
                known = span.size if full else 0
                count = str(known) if known else _count(lo, hi)
                loops.append(
                    Loop((a,), lo, count, known or s.most(a), grain=math.gcd(s.grain(a), known) if known else 1)
                )
                taken.add(a)
            elif (full and len(inside) == len(span.axes) and not (alone and inner in span.axes)
                  and all(s.tile[a] >= s.extent[a] for a in span.axes[1:])):  # fmt: skip
                sizes = tuple(s.most(a) for a in span.axes)
                loops.append(Loop(span.axes, span.lo, f"(({span.hi}) - ({span.lo}))", math.prod(sizes), sizes))
                taken.update(span.axes)
            elif inside:
                self.guards.append((tuple(inside), span))
        for a in box:
            if a not in taken:
                lo, hi = self._clip(a, box[a], s.lo(a), s.hi(a))
                count = s.count(a) if (lo, hi) == (s.lo(a), s.hi(a)) else _count(lo, hi)
                same = s.grain(a) if lo == s.lo(a) else int(lo) if lo.isdigit() else 1
                loops.append(Loop((a,), lo, count, s.most(a), grain=same))
        loops.sort(key=lambda x: (inner in x.axes, x.axes))
        return loops

    def _contiguous(self, p: Printer) -> int | None:
        """The number of the axis along which most of what is loaded and stored is contiguous: the last of the best."""
        nest = p.nest
        wide = [a for a, (lo, hi) in nest.box.items() if hi - lo > 1]
        places = [nest.store.place, *(nest.place(x) for x in p.order(roots_of(nest)) if isinstance(x, Load | Acc))]

        def score(a: int) -> float:
            n = nest.box[a][1] - nest.box[a][0]
            near = sum({0: 0.1, 1: 1.0}.get(x.strides.get(a, 0), -1.0) for x in places)
            return near * min(n, 32) / 32

        return self.number[max(reversed(wide), key=score)] if wide else None

    def _clip(self, a: int, box: tuple[int, int], lo: str, hi: str) -> tuple[str, str]:
        if box[0] > 0:
            lo = str(max(int(lo), box[0])) if lo.isdigit() else f"max({lo}, {box[0]})"
        if box[1] < self.space.extent[a]:
            hi = str(min(int(hi), box[1])) if hi.isdigit() else f"min({hi}, {box[1]})"
        return lo, hi

    def declare(self, loops: Sequence[Loop], flat: str, tag: str = "") -> None:
        """`flat` taken apart into axis values, the last loop fastest."""
        rest = flat
        for n, x in reversed(list(enumerate(loops))):
            if n == 0:
                digit = rest
            elif x.count == "1":
                digit = "0"
            else:
                digit = f"(int)((u32)({rest}) % (u32){x.count})"
                self.out(f"const int d{tag}{n} = {digit};")
                self.out(f"const int q{tag}{n} = (int)((u32)({rest}) / (u32){x.count});")
                digit, rest = f"d{tag}{n}", f"q{tag}{n}"
            if len(x.axes) == 1:
                self.out(f"const int i{x.axes[0]} = {x.base} + {digit};")
            else:
                at = f"({x.base} + {digit})"
                for m in range(len(x.axes) - 1, -1, -1):
                    below = math.prod(x.sizes[m + 1 :])
                    part = at if below == 1 else f"{at} / {below}"
                    if m:
                        part = f"({part}) % {x.sizes[m]}"
                    self.out(f"const int i{x.axes[m]} = {self.space.lo(x.axes[m])} + {part};")
        new = {a for x in loops for a in x.axes}
        before, self.declared = self.declared, self.declared | new
        for inside, span in self.guards:  # a box inside a span: points of other chunks are skipped
            if set(inside) <= self.declared and not set(inside) <= before:
                at = "0"
                for a in span.axes:
                    low = self.space.lo(a)
                    i = "0" if a not in self.declared else f"i{a}" if low == "0" else f"(i{a} - {low})"
                    at = f"({at}) * {self.space.most(a)} + {i}"
                self.out(f"const int at = {at};")
                self.out(f"if (at < {span.lo} || at >= {span.hi}) continue;")

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Axes that are declared inside are unknown after it."""
        before = self.declared
        yield
        self.declared = before

    # ------------------------------------------------------------------------------------------------------ flat nests

    def points(self, p: Printer, loops: Sequence[Loop], number: Callable[[int], str], size: int, given: Mapping[Expr, str],
               kept: Mapping[Expr, str] | None = None) -> None:  # fmt: skip
        """All points of `loops`, a thread a point (or some neighbours, `wide`), stored. number: the thread's number in a nest of
        so many; given: names of what is known; kept: of what a thread has for each of its points (`name[u]`, point u of
        the thread), all in one turn."""
        out, roots, store, kept = self.out, roots_of(p.nest), p.nest.store, kept or {}
        most = math.prod(x.most for x in loops)
        serial = [x for x in loops if self.collides(p.nest, x)]
        if serial and not kept:
            self._serially(p, [x for x in loops if x not in serial], serial, number(most), size, given)
            return
        if not kept and (n := wide.width(self, p, loops, size)) > 1:
            wide.points(self, p, loops, number(-(-most // n)), size, n, given)
            return
        rank = number(most)
        nodes = p.order(roots, {**given, **kept})
        deep = DEEP if sum(not isinstance(x, Const) for x in nodes) < LIGHT else BATCH
        batch = -(-most // size) if kept else max(1, min(deep, -(-most // size)))
        out(f"const int total = {' * '.join(x.count for x in loops) or '1'};")
        if batch == 1 and not kept:
            out(f"for (int q = {rank}; q < total; q += {size}) {{")
            with self.scope():
                self.declare(loops, "q")
                names = dict(given)
                p.block(nodes, names)
                p.store(store.place, names, names[roots[0]], self.where(p, names))
            out("}")
            return
        late = [r for r in dict.fromkeys(roots) if r not in given and not isinstance(r, Const)]
        held = {r: f"x{n}" for n, r in enumerate(late)}
        if kept:
            out(f"const int p0 = {rank};")
        else:
            out(f"for (int p0 = {rank}; p0 < total; p0 += {batch * size}) {{")
        if held:
            out(f"u32 {', '.join(f'{x}[{batch}]' for x in held.values())};")
        for stage in ("compute", "store"):
            if stage == "compute" and not held:
                continue
            out("#pragma unroll")
            out(f"for (int u = 0; u < {batch}; ++u) {{")
            out(f"const int q = p0 + u * {size};")
            out("if (q >= total) continue;")
            with self.scope():
                self.declare(loops, "q")
            names = {**given, **{x: f"{name}[u]" for x, name in kept.items()}}
            if stage == "compute":
                p.block(nodes, names)
                for r, x in held.items():
                    out(f"{x}[u] = {names[r]};")
            else:
                names |= {r: f"{x}[u]" for r, x in held.items()}
                p.block([r for r in dict.fromkeys(roots) if r not in names], names)
                p.store(store.place, names, names[roots[0]], self.where(p, names))
            out("}")
        if not kept:
            out("}")

    def _serially(self, p: Printer, free: Sequence[Loop], serial: Sequence[Loop], rank: str, size: int,
                  given: Mapping[Expr, str]) -> None:  # fmt: skip
        """What may meet in one place does so in index order, in one thread."""
        out, roots = self.out, roots_of(p.nest)
        out(f"const int total = {' * '.join(x.count for x in free) or '1'};")
        out(f"const int times = {' * '.join(x.count for x in serial)};")
        out(f"for (int q = {rank}; q < total; q += {size})")
        out("for (int n = 0; n < times; ++n) {")
        self.declare(free, "q")
        self.declare(serial, "n", "s")
        names = dict(given)
        p.block(p.order(roots, names), names)
        p.store(p.nest.store.place, names, names[roots[0]], self.where(p, names))
        out("}")

    def collides(self, nest: Nest, x: Loop) -> bool:
        """Whether two indices of a loop of one task may store to one element."""
        box = {a: (0, min(hi - lo, self.space.most(self.number[a]))) for a, (lo, hi) in nest.box.items()}
        return not {self.number[a] for a in nest.store.place.apart(box)} >= set(x.axes)

    def _flat(self, p: Printer, loops: list[Loop]) -> None:
        if self._copies(p, loops):
            self._copy(p, loops)
        else:
            self.points(p, loops, self.thread, THREADS, {})

    # ----------------------------------------------------------------------------------------------------------- copies

    def _copies(self, p: Printer, loops: list[Loop]) -> bool:
        """Whether the nest only moves bf16 into shared memory, and 16 bytes at a time are contiguous and aligned on both sides."""
        value, store, target = value_of(p.nest), p.nest.store, p.scratch.get(p.nest.store.place.slot)
        if target is None or not target.shared or not isinstance(value, Load | Acc) or store.where is not None:
            return False
        if store.mode != "set" or not loops or self.guards or not wide.runs(loops[-1], WIDE):
            return False
        axis, places = wide.innermost(p, loops), [p.nest.place(value), store.place]
        return all(wide.dtype(p, x) == "BF16" and not x.dyn and wide.is_run(self, p, x, axis, WIDE) for x in places)

    def _copy(self, p: Printer, loops: Sequence[Loop]) -> None:
        """Points in groups of `WIDE` by asynchronous copies: no registers, everything on the way at once."""
        value = value_of(p.nest)
        assert isinstance(value, Load | Acc)
        out, most = self.out, math.prod(x.most for x in loops)
        (a, i, _), (b, j, _) = (p.element(x, {}) for x in (p.nest.place(value), p.nest.store.place))
        out(f"const int total = {' * '.join(x.count for x in loops)};")
        out("#pragma unroll 4")
        out(f"for (int q = {self.thread(-(-most // WIDE))} * {WIDE}; q < total; q += {WIDE * THREADS}) {{")
        self.declare(loops, "q")
        out(f"copy16((u16*)({b}) + {j}, (const u16*)({a}) + {i});")
        out("}")
        out("copy16_wait();")


def _count(lo: str, hi: str) -> str:
    """The indices of a box that a task cuts: none where they do not meet (two such loops must not make a product)."""
    return str(max(0, int(hi) - int(lo))) if lo.isdigit() and hi.isdigit() else f"max(0, {hi} - {lo})"
