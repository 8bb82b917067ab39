"""Codes (the bytecode of `jax_mpk.abi`) as straight-line CUDA C++ with loops over their axes.

A code without reductions is one flat loop over its points, a thread a point. With reductions, a group of threads (a
warp, or all consumers) takes an outer point at a time: scalars in every thread, reductions across the group, the
vector stage spread over it. Pure instructions of several points run before their stores, so that loads overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cuda_reuse import DTYPES, OPCODES, REDUCE_STAGE, SCALAR, STORES, VECTOR, Reuse, unary
from jax_mpk.backends.cuda_space import Lines, Loop, Scratch, Space, Span, reg

REDUCE = abi.ENUMS["ReduceOp"]
THREADS = 512
WARPS = THREADS // 32
BATCH = 4
"""Points a thread has in flight."""
LIGHT = 3
"""Instructions of a point of which a thread has `DEEP` in flight, and `LONG` of a reduction."""
DEEP, LONG = 8, 16
WIDE = 8
"""bf16 elements of a 16-byte copy."""


class Emitter(Reuse):
    """Emits the codes of one operator. `scratch` maps slots, `spans` replaces ranges of axes, `aligned` are the slots
    that start at multiples of 16 bytes."""

    def __init__(self, program: abi.Program, space: Space, n_axes: int, aligned: frozenset[int] = frozenset()):
        self.p, self.space, self.n_axes, self.aligned = program, space, n_axes, aligned
        self.out = Lines()
        self.turn: int | None = None
        """The warp that the next code starts at, if codes are spread over the warps; else they all start at the first."""

    def _open(self, number: int, scratch: Mapping[int, Scratch]) -> list[int]:
        """Makes a code the current one; its axes."""
        self.scratch, self.c = scratch, self.p["Code"][number]
        self.stages = self.p["Stage"][int(self.c["stage"]) : int(self.c["stage"]) + int(self.c["stages"])]
        self.vector = int(self.c["vector"])
        self.guards: list[tuple[tuple[int, ...], Span]] = []
        self.static: dict[int, str] = {}
        return [a for a in range(self.n_axes) if int(self.c["axes"]) >> a & 1]

    def code(self, number: int, scratch: Mapping[int, Scratch], spans: Sequence[Span] = ()) -> None:
        """Appends the statements of one code."""
        axes = self._open(number, scratch)
        loops = self._loops(axes, spans)
        self.static = {a: self.space.lo(a) for a in range(self.n_axes) if a not in axes}
        self.out("{")
        if any(int(s["kind"]) == REDUCE_STAGE for s in self.stages):
            inner = [x for x in loops if self.vector in x.axes]
            self._grouped([x for x in loops if x not in inner], inner)
        else:
            self._flat(loops)
        self.out("}")

    def everyone(self, number: int, scratch: Mapping[int, Scratch]) -> None:
        """Appends the statements of one scalar code, which every thread runs for itself."""
        self._open(number, scratch)
        self.static = {a: self.space.lo(a) for a in range(self.n_axes)}
        self.out("{")
        self._straight(self._instrs_of_all(), {}, "")
        self.out("}")

    def point(self, number: int, at: Mapping[int, str], slot: int, name: str) -> None:
        """Appends the statements of one code at one point: `at` gives the coordinates (those of other axes are the
        tile's first), and the float `name` stands for the element of `slot`."""
        axes = self._open(number, {})
        self.static = {a: at.get(a, self.space.lo(a)) for a in range(self.n_axes)}
        lo, hi = self.c["lo"], self.c["hi"]
        inside = [f"{at[a]} >= {lo[a]}" for a in axes if a in at and lo[a] > 0]
        inside += [f"{at[a]} < {hi[a]}" for a in axes if a in at and hi[a] < self.space.extent[a]]
        self.out(f"if ({' && '.join(inside)}) {{" if inside else "{")
        self._straight(self._instrs_of_all(), {slot: name}, name)
        self.out("}")

    def _straight(self, instrs: list[np.void], names: Mapping[int, str], name: str) -> None:
        self._registers(instrs)
        for i in instrs:
            op = OPCODES[int(i["op"])]
            here = op in ("LOAD", "STORE") and int(self._access(int(i["aux"]))["slot"]) in names
            if here:
                self.out(f"{reg(int(i['dst']))} = b({name});" if op == "LOAD" else f"{name} = f({reg(int(i['a']))});")
            else:
                self.out(self._store(i) if op in STORES else self._pure(i))

    def _instrs_of_all(self) -> list[np.void]:
        return [i for s in self.stages for i in self._instrs(int(s["first"]), int(s["count"]))]

    def _thread(self, points: int) -> str:
        """The number of this thread in a code of so many points; the next code starts after them."""
        if self.turn is None:
            return "thread()"
        first, self.turn = self.turn, (self.turn + -(-points // 32)) % WARPS
        return f"thread({THREADS - 32 * first})" if first else "thread()"

    def _warp(self, points: int) -> str:
        """The same for the warps."""
        if not self.turn:
            self.turn = None if self.turn is None else points % WARPS
            return "WarpGroup::index()"
        first, self.turn = self.turn, (self.turn + points) % WARPS
        return f"(WarpGroup::index() + {WARPS - first}) % {WARPS}"

    # ---------------------------------------------------------------------------------------------------------- loops

    def _loops(self, axes: list[int], spans: Sequence[Span]) -> list[Loop]:
        s, c, loops, taken = self.space, self.c, [], set()
        for span in spans:
            full = all(c["lo"][a] <= 0 and c["hi"][a] >= s.extent[a] for a in span.axes)
            inside = [a for a in span.axes if a in axes]
            if len(span.axes) == 1 and inside:
                a = span.axes[0]
                lo, hi = self._clip(a, f"({s.lo(a)} + ({span.lo}))", f"({s.lo(a)} + ({span.hi}))")
                known = span.size if full else 0
                loops.append(Loop((a,), lo, str(known) if known else _count(lo, hi), known or s.most(a)))
                taken.add(a)
            elif full and len(inside) == len(span.axes) and self._whole(span):
                sizes = tuple(s.most(a) for a in span.axes)
                loops.append(Loop(span.axes, span.lo, f"(({span.hi}) - ({span.lo}))", math.prod(sizes), sizes))
                taken.update(span.axes)
            elif inside:
                self.guards.append((tuple(inside), span))
        for a in axes:
            if a not in taken:
                lo, hi = self._clip(a, s.lo(a), s.hi(a))
                count = s.count(a) if (lo, hi) == (s.lo(a), s.hi(a)) else _count(lo, hi)
                loops.append(Loop((a,), lo, count, s.most(a)))
        loops.sort(key=lambda x: (self.vector in x.axes, x.axes))
        return loops

    def _whole(self, span: Span) -> bool:
        """A span may stand for its axes if no stage needs one of them alone, and only the first is cut."""
        s = self.space
        alone = self.vector in span.axes and any(int(x["kind"]) == REDUCE_STAGE for x in self.stages)
        return not alone and all(s.tile[a] >= s.extent[a] for a in span.axes[1:])

    def _clip(self, a: int, lo: str, hi: str) -> tuple[str, str]:
        box_lo, box_hi = int(self.c["lo"][a]), int(self.c["hi"][a])
        if box_lo > 0:
            lo = str(max(int(lo), box_lo)) if lo.isdigit() else f"max({lo}, {box_lo})"
        if box_hi < self.space.extent[a]:
            hi = str(min(int(hi), box_hi)) if hi.isdigit() else f"min({hi}, {box_hi})"
        return lo, hi

    def _declare(self, loops: Sequence[Loop], flat: str, tag: str = "") -> None:
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

        known = {a for x in loops for a in x.axes}
        for inside, span in self.guards:  # a box inside a span: points of other chunks are skipped
            if known & set(inside):
                sizes = [self.space.most(a) for a in span.axes]
                strides = {a: math.prod(sizes[n + 1 :]) for n, a in enumerate(span.axes)}
                self.out(f"const int at = {self._sum(strides, 0, True, False)};")
                self.out(f"if (at < {span.lo} || at >= {span.hi}) continue;")

    # --------------------------------------------------------------------------------------------------- instructions

    def _instrs(self, first: int, count: int) -> list[np.void]:
        return list(self.p["Instr"][first : first + count])

    def _access(self, aux: int) -> np.void:
        return self.p["Access"][int(self.c["access"]) + aux]

    def _index(self, a: int) -> str:
        return self.static.get(a, f"i{a}")

    def _sum(self, terms: Mapping[int, int], offset: int, relative: bool, wide: bool) -> str:
        parts = []
        for a, stride in terms.items():
            i = self._index(a)
            if relative and a < self.n_axes:
                if i == self.space.lo(a):
                    continue
                if self.space.lo(a) != "0":
                    i = f"({i} - {self.space.lo(a)})"
            if i == "0":
                continue
            parts.append(i if stride == 1 else f"{'(i64)' if wide else ''}{i} * {stride}")
        if offset or not parts:
            parts.append(str(offset))
        return " + ".join(parts)

    def _strides(self, x: np.void) -> dict[int, int]:
        return {a: int(v) for a, v in enumerate(x["stride"]) if v}

    def _place(self, aux: int) -> tuple[str, str, str]:
        """Pointer, element index and dtype of access `aux`."""
        x = self._access(aux)
        slot, dtype, strides, offset = int(x["slot"]), DTYPES[int(x["dtype"])], self._strides(x), int(x["offset"])
        if slot >= abi.SLOT_ACT:
            m = self.scratch[slot]
            dtype = m.dtype or dtype
            if not m.length:
                return m.pointer, self._sum(strides, offset, True, False), dtype
            rows = {a: v // m.length for a, v in strides.items() if a in m.rows}
            cols = {a: v for a, v in strides.items() if a not in m.rows}
            row = self._sum(rows, offset // m.length, True, False)
            col = self._sum(cols, offset % m.length, True, False)
            row = row if m.row0 == "0" else f"{row} - {m.row0}"
            col = col if m.col0 == "0" else f"{col} - {m.col0}"
            return m.pointer, f"({row}) * {m.ld} + {col}", dtype
        reach = sum(abs(v) * (self.space.extent[a] if a < self.n_axes else 1 << 20) for a, v in strides.items())
        at = self._sum(strides, offset, False, reach + abs(offset) >= 1 << 31)
        for d in range(int(x["n_dyn"])):
            at += f" + clamp_to({reg(int(x['dyn_reg'][d]))}, {int(x['dyn_limit'][d])}) * {int(x['dyn_stride'][d])}"
        return f"d.ptr[{slot}]", at, dtype

    def _uses(self, i: np.void) -> set[int]:
        """Registers that a store reads."""
        op = OPCODES[int(i["op"])]
        used = {int(i["a"])} | ({int(i["b"])} if op != "STORE" else set())
        x = self._access(int(i["aux"]))
        return used | {int(x["dyn_reg"][d]) for d in range(int(x["n_dyn"]))}

    def _pure(self, i: np.void) -> str:
        op, dst = OPCODES[int(i["op"])], reg(int(i["dst"]))
        a, b, c = (reg(int(i[k])) for k in "abc")
        if op == "CONST":
            return f"{dst} = {int(i['imm']):#x}u;"
        if op == "INDEX":
            at = self._sum(self._strides(self._access(int(i["aux"]))), 0, False, False)
            return f"{dst} = (u32)({at} + {np.int32(np.uint32(i['imm']))});"
        if op == "LOAD":
            pointer, at, dtype = self._place(int(i["aux"]))
            return f"{dst} = load<{dtype}>({pointer}, {at});"
        if op == "SELECT":
            return f"{dst} = SELECT({a}, {b}, {c});"
        if op == "MOVE" or unary(op):
            return f"{dst} = {op}({a});"
        return f"{dst} = {op}({a}, {b});"

    def _store(self, i: np.void) -> str:
        op = OPCODES[int(i["op"])]
        pointer, at, dtype = self._place(int(i["aux"]))
        a, b = reg(int(i["a"])), reg(int(i["b"]))
        if op == "STORE":
            return f"store<{dtype}>({pointer}, {at}, {a});"
        if op == "STORE_IF":
            return f"if ({b}) store<{dtype}>({pointer}, {at}, {a});"
        return f"if ({b}) store<{dtype}>({pointer}, {at}, add_as<{dtype}>(load<{dtype}>({pointer}, {at}), {a}));"

    def _registers(self, instrs: Sequence[np.void]) -> None:
        names = sorted(
            {reg(int(i["dst"])) for i in instrs if OPCODES[int(i["op"])] not in STORES},
            key=lambda n: (n[0], int(n[1:])),
        )
        if names:
            self.out("u32 " + ", ".join(names) + ";")

    # ---------------------------------------------------------------------------------------------------------- shapes

    def _points(self, instrs: list[np.void], loops: Sequence[Loop], rank: str, size: int, most: int,
                carried: Mapping[int, str] = {}) -> None:  # fmt: skip
        """All points of `loops`, a thread a point. Instructions up to the first store run for several points first."""
        total = " * ".join(x.count for x in loops) or "1"
        if carried:
            keep = self._live(instrs, carried)
            instrs, carried = [instrs[n] for n in keep], {at: carried[n] for at, n in enumerate(keep) if n in carried}
        first = next((n for n, i in enumerate(instrs) if OPCODES[int(i["op"])] in STORES), len(instrs))
        head, tail = instrs[:first], instrs[first:]
        serial = [x for x in loops if self._collides(tail, x)]
        only_stores = all(OPCODES[int(i["op"])] in STORES for i in tail)
        deep = DEEP if len(instrs) <= LIGHT else BATCH
        batch = 1 if serial or not only_stores else max(1, min(deep, -(-most // size)))
        if carried:
            batch = -(-most // size)  # one turn: point u of a thread is what it carries in place u
        out = self.out
        if serial:  # what may meet in one place does so in index order, in one thread
            free = [x for x in loops if x not in serial]
            out(f"const int total = {' * '.join(x.count for x in free) or '1'};")
            out(f"const int times = {' * '.join(x.count for x in serial)};")
            out(f"for (int p = {rank}; p < total; p += {size})")
            out("for (int n = 0; n < times; ++n) {")
            self._declare(free, "p")
            self._declare(serial, "n", "s")
            self._registers(instrs)
            for i in instrs:
                out(self._store(i) if OPCODES[int(i["op"])] in STORES else self._pure(i))
            out("}")
            return
        out(f"const int total = {total};")
        if batch == 1:
            out(f"for (int p = {rank}; p < total; p += {size}) {{")
        else:
            out(f"for (int p0 = {rank}; p0 < total; p0 += {batch * size}) {{")
        if batch == 1:
            self._declare(loops, "p")
            self._registers(instrs)
            for n, i in enumerate(instrs):
                op = OPCODES[int(i["op"])]
                out(
                    self._store(i)
                    if op in STORES
                    else f"{reg(int(i['dst']))} = {carried[n]}[0];"
                    if n in carried
                    else self._pure(i)
                )
            out("}")
            return
        made = {int(i["dst"]) for i in head}
        kept = sorted({r for i in tail for r in self._uses(i)} & made)
        for r in kept:
            out(f"u32 k_{reg(r)}[{batch}];")
        out("#pragma unroll")
        out(f"for (int u = 0; u < {batch}; ++u) {{")
        out(f"const int p = p0 + u * {size};")
        out("if (p >= total) continue;")
        self._declare(loops, "p")
        self._registers(head)
        for n, i in enumerate(head):
            out(f"{reg(int(i['dst']))} = {carried[n]}[u];" if n in carried else self._pure(i))
        for r in kept:
            out(f"k_{reg(r)}[u] = {reg(r)};")
        out("}")
        out("#pragma unroll")
        out(f"for (int u = 0; u < {batch}; ++u) {{")
        out(f"const int p = p0 + u * {size};")
        out("if (p >= total) continue;")
        self._declare(loops, "p")
        for r in kept:
            out(f"const u32 {reg(r)} = k_{reg(r)}[u];")
        for i in tail:
            out(self._store(i))
        out("}")
        out("}")

    def _collides(self, stores: Sequence[np.void], x: Loop) -> bool:
        """Whether two indices of a loop may store to one element: a place known at run time, and not apart by the loop."""
        for i in stores:
            if OPCODES[int(i["op"])] in STORES:
                a = self._access(int(i["aux"]))
                if int(a["n_dyn"]) and not all(self._strides(a).get(axis) for axis in x.axes):
                    return True
        return False

    def _flat(self, loops: list[Loop]) -> None:
        instrs = self._instrs_of_all()
        most = math.prod(x.most for x in loops)
        if self._copies(instrs, loops):
            self._copy(instrs, loops, most)
        else:
            self._points(instrs, loops, self._thread(most), THREADS, most)

    def _copies(self, instrs: list[np.void], loops: Sequence[Loop]) -> bool:
        """Whether the code only moves bf16, and 16 bytes at a time are contiguous and aligned on both sides."""
        if [OPCODES[int(i["op"])] for i in instrs] != ["LOAD", "STORE"] or int(instrs[0]["dst"]) != int(instrs[1]["a"]):
            return False
        if (
            not loops
            or self.guards
            or len(loops[-1].axes) != 1
            or loops[-1].most % WIDE
            or not loops[-1].count.isdigit()
        ):
            return False
        inner = loops[-1].axes[0]
        for i in instrs:
            x = self._access(int(i["aux"]))
            slot, strides = int(x["slot"]), self._strides(x)
            m = self.scratch.get(slot)
            if (
                ((m.dtype if m else "") or DTYPES[int(x["dtype"])]) != "BF16"
                or int(x["n_dyn"])
                or int(x["offset"]) % WIDE
            ):
                return False
            if strides.pop(inner, 0) != 1 or any(v % WIDE for v in strides.values()):
                return False
            if m and (m.row0 != "0" or (m.col0 != "0" and not m.shared) or m.ld % WIDE or m.length % WIDE):
                return False
            if not m and slot not in self.aligned:
                return False
        return all(self.space.most(a) % WIDE == 0 or self.space.most(a) == self.space.extent[a] for a in (inner,))

    def _copy(self, instrs: list[np.void], loops: Sequence[Loop], most: int) -> None:
        """Points in groups of `WIDE`, all loads of a thread before its stores."""
        target = self.scratch.get(int(self._access(int(instrs[1]["aux"]))["slot"]))
        if target is not None and target.shared:
            self._copy_to_shared(instrs, loops, most)
            return
        out, each = self.out, max(1, min(BATCH, -(-most // (WIDE * THREADS))))
        out(f"const int total = {' * '.join(x.count for x in loops)};")
        out(f"for (int p0 = {self._thread(-(-most // WIDE))} * {WIDE}; p0 < total; p0 += {each * WIDE * THREADS}) {{")
        out(f"uint4 wide[{each}];")
        for n, i in enumerate(instrs):
            pointer, at, _ = self._place(int(i["aux"]))
            out("#pragma unroll")
            out(f"for (int u = 0; u < {each}; ++u) {{")
            out(f"const int p = p0 + u * {WIDE * THREADS};")
            out("if (p >= total) continue;")
            self._declare(loops, "p")
            place = f"*({'' if n else 'const '}uint4*)((u16*)({pointer}) + {at})"
            out(f"{place} = wide[u];" if n else f"wide[u] = {place};")
            out("}")
        out("}")

    def _copy_to_shared(self, instrs: list[np.void], loops: Sequence[Loop], most: int) -> None:
        """The same by asynchronous copies: no registers, and everything is on the way at once."""
        out = self.out
        out(f"const int total = {' * '.join(x.count for x in loops)};")
        out("#pragma unroll 4")
        out(f"for (int p = {self._thread(-(-most // WIDE))} * {WIDE}; p < total; p += {WIDE * THREADS}) {{")
        self._declare(loops, "p")
        source, target = (self._place(int(i["aux"])) for i in instrs)
        out(f"copy16((u16*)({target[0]}) + {target[1]}, (const u16*)({source[0]}) + {source[1]});")
        out("}")
        out("copy16_wait();")

    def _grouped(self, outer: list[Loop], inner: list[Loop]) -> None:
        out, points = self.out, math.prod(x.most for x in outer)
        work = max(self._reduction(s)[0] for s in self.stages if int(s["kind"]) == REDUCE_STAGE)
        work = max(work, math.prod(x.most for x in inner))
        warp = -(-points // 16) * (work / 32 + 8) < points * (work / THREADS + 32)
        if any(self._collides(self._instrs_of_all(), x) for x in outer):
            warp = False  # the points one after the other: each has a reduction, and with it barriers
        group, size = ("WarpGroup", 32) if warp else ("BlockGroup", THREADS)
        out(f"const int points = {' * '.join(x.count for x in outer) or '1'};")
        index = self._warp(points) if warp else "BlockGroup::index()"
        out(f"for (int o = {index}; o < points; o += {group}::count) {{")
        self._declare(outer, "o")
        every = self._instrs_of_all()
        scalars = [i for i in every if OPCODES[int(i["op"])] not in STORES and not int(i["dst"]) & abi.VECTOR_REG]
        names = {reg(int(i["dst"])) for i in scalars} | {
            reg(int(s["dst"])) for s in self.stages if int(s["kind"]) == REDUCE_STAGE
        }
        if names:
            out("u32 " + ", ".join(sorted(names, key=lambda n: int(n[1:]))) + ";")
        start = {a: x.base for x in inner for a in x.axes}
        turns = -(-math.prod(x.most for x in inner) // size)
        carried = self._carried(inner, size)
        early = before = self._early(turns, frozenset(c[3] for c in carried))
        for n, _, register, _ in carried:
            out(f"u32 c{n}_{reg(register)}[{turns}];")
        for n, s in enumerate(self.stages):
            if early and int(s["kind"]) == REDUCE_STAGE:
                self._ahead(early, inner, f"{group}::rank()", size, turns)
                early = []
            instrs = self._instrs(int(s["first"]), int(s["count"]))
            if int(s["kind"]) == VECTOR:
                out("{")
                mine = {c[3]: f"c{c[0]}_{reg(c[2])}" for c in carried} | {
                    at: f"e{at}" for at, _, keep in before if keep
                }
                self._points(instrs, inner, f"{group}::rank()", size, math.prod(x.most for x in inner), mine)
                out("}")
                continue
            keep = dict(self.static)
            self.static.update(start)
            if int(s["kind"]) == SCALAR:
                for i in instrs:
                    if OPCODES[int(i["op"])] in STORES:
                        out(f"if ({group}::rank() == 0) {{ {self._store(i)} }}")
                    else:
                        out(self._pure(i))
            else:
                self._reduce(s, instrs, group, size, {c[2]: f"c{c[0]}_{reg(c[2])}" for c in carried if c[0] == n})
            self.static = keep
        out("}")

    def _ahead(self, before: Sequence[tuple[int, np.void, bool]], inner: Sequence[Loop], rank: str, size: int,
               turns: int) -> None:  # fmt: skip
        """What the vector stage needs of memory and not of a reduction, before the reductions: one wait for memory."""
        out = self.out
        for at, _, keep in before:
            if keep:
                out(f"u32 e{at}[{turns}];")
        out("#pragma unroll")
        out(f"for (int u = 0; u < {turns}; ++u) {{")
        out(f"const int p = {rank} + u * {size};")
        out(f"if (p >= {' * '.join(x.count for x in inner) or '1'}) continue;")
        self._declare(inner, "p")
        self._registers([i for _, i, _ in before])
        for at, i, keep in before:
            out(self._pure(i))
            if keep:
                out(f"e{at}[u] = {reg(int(i['dst']))};")
        out("}")

    def _reduction(self, s: np.void) -> tuple[int, list[tuple[int, int]]]:
        ranges = [(int(s["lo"][j]), int(s["hi"][j])) for j in range(int(s["axes"]))]
        return math.prod(max(0, hi - lo) for lo, hi in ranges), ranges

    def _reduce(
        self, s: np.void, instrs: list[np.void], group: str, size: int, carried: Mapping[int, str] = {}
    ) -> None:
        out = self.out
        total, ranges = self._reduction(s)
        first = int(s["axis"])
        kind, dtype = REDUCE[int(s["reduce"])], DTYPES[int(s["dtype"])]
        extreme = kind in ("ARGMAX", "ARGMIN")
        letter = "F" if dtype == "F32" else "U" if dtype in ("U32", "BOOL") and kind in ("MAX", "MIN") else "I"
        op, dst, src = f"{kind}_{letter}", reg(int(s["dst"])), reg(int(s["src"]))
        out("{")
        out("u32 key = 0, best = ~0u;" if extreme else f"u32 x = {op}::first;")
        if carried:
            out("#pragma unroll")
            out(f"for (int u = 0; u < {-(-total // size)}; ++u) {{")
            out(f"const int e = {group}::rank() + u * {size};")
            out(f"if (e >= {total}) continue;")
        else:
            out(f"#pragma unroll {LONG if len(instrs) <= LIGHT and total >= LONG * size else BATCH}")
            out(f"for (int e = {group}::rank(); e < {total}; e += {size}) {{")
        rest = "e"
        for j in range(len(ranges) - 1, -1, -1):
            lo, hi = ranges[j]
            digit = rest if j == 0 else f"{rest} % {hi - lo}"
            out(f"const int i{first + j} = {lo} + {digit};")
            rest = f"({rest} / {hi - lo})"
        self._registers([i for i in instrs if int(i["dst"]) & abi.VECTOR_REG])
        for i in instrs:
            out(self._pure(i))
        for r, name in carried.items():
            out(f"{name}[u] = {reg(r)};")
        if extreme:
            key = f"extreme_key<{dtype if dtype != 'BOOL' else 'U32'}, {str(kind == 'ARGMAX').lower()}>({src})"
            out(f"better(key, best, {key}, (u32)i{first});")
        else:
            out(f"x = {op}::op(x, {src});")
        out("}")
        if extreme:
            out(f"{dst} = reduce_extreme<{group}>(key, best, w.sh->scratch);")
        else:
            out(f"x = reduce<{group}, {op}>(x, w.sh->scratch);")
            out(f"{dst} = {op}::op({dst}, x);" if int(s["flags"]) & abi.ACCUMULATE else f"{dst} = x;")
        out("}")


def _count(lo: str, hi: str) -> str:
    """The indices of a box that a task cuts: none where they do not meet (two such loops must not make a product)."""
    return str(max(0, int(hi) - int(lo))) if lo.isdigit() and hi.isdigit() else f"max(0, {hi} - {lo})"


def rounds_only(program: abi.Program, codes: range, matters: Callable[[str], bool]) -> bool:
    """Whether these codes only load, round and store (`matters` says which other instructions do not count)."""
    for n in codes:
        c = program["Code"][n]
        for s in program["Stage"][int(c["stage"]) : int(c["stage"]) + int(c["stages"])]:
            for i in program["Instr"][int(s["first"]) : int(s["first"]) + int(s["count"])]:
                op = OPCODES[int(i["op"])]
                if op not in ("LOAD", "STORE", "MOVE", "F_ROUND_BF16", "F_ROUND_F16", "INDEX") and matters(op):
                    return False
    return True
