"""What the generator of every kind of task works with: its tile, its parts, questions about its codes, room for scratch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cuda_code import Emitter
from jax_mpk.backends.cuda_space import Scratch, Space, Span

ROOM = 66 << 10
"""Most bytes of activations, and of accumulators, in shared memory; beyond it they go to the workspace."""
ROLE, PARAM, KIND = (lambda m, e=e: abi.enum(e, m) for e in ("Role", "Param", "Kind"))


@dataclass
class Unit:
    """What the generator decides about one operator."""

    variant: int
    parts: int = 1
    tickets: int = 0
    partial: int = 0  # bytes in the workspace
    stream: bool = False


@dataclass
class Need:
    """Bytes that the variants of a program need: of activation and accumulators in shared memory, of a block's spill."""

    act: int = 0
    acc: int = 0
    spill: int = 0


@dataclass
class Builder:
    """A program's variants as they come: `bodies` are texts with their numbers, `names` their calls, `streamed` the
    operators whose weights the loader brings."""

    program: abi.Program
    streamed: set[int]
    bodies: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    need: Need = field(default_factory=Need)
    memo: dict[bytes, Unit] = field(default_factory=dict)


def aligned(p: abi.Program, op: np.void) -> bytes:
    """Which slots of an operator start at a multiple of 16 bytes."""
    return (p["Slot"]["offset"][int(op["slot"]) : int(op["slot"]) + int(op["slots"])] % 16 == 0).tobytes()


def codes_of(op: np.void, role: str) -> range:
    r = ROLE(role)
    return range(int(op["code"][r]), int(op["code"][r]) + int(op["codes"][r]))


class Op:
    """Helpers that every kind needs: the tile of the operator, and functions of its variant struct."""

    def __init__(self, b: Builder, op: np.void):
        self.b, self.op, self.p, self.n = b, op, b.program, int(op["n_axes"])
        self.extent = [int(x) for x in op["extent"][: self.n]]
        self.tile = [max(1, min(int(t), e)) for t, e in zip(op["tile"][: self.n], self.extent, strict=True)]
        self.space = Space(self.extent, self.tile)
        self.lines: list[str] = []

    def param(self, name: str) -> int:
        return int(self.op["params"][PARAM(name)])

    def access(self, number: int) -> np.void:
        return self.p["Access"][int(self.op["access"]) + number]

    @property
    def tasks(self) -> int:
        return math.prod(-(-e // t) for e, t in zip(self.extent, self.tile, strict=True))

    def range(self) -> str:
        """`range(index)`: the bounds of every axis that is cut."""
        out = [f"struct Range {{ int lo[{max(self.n, 1)}], hi[{max(self.n, 1)}]; }};",
               "static __device__ __forceinline__ Range range(u32 index) {", "  Range r;"]  # fmt: skip
        for a in reversed(range(self.n)):
            e, t = self.extent[a], self.tile[a]
            parts = -(-e // t)
            if parts == 1:
                out.append(f"  r.lo[{a}] = 0; r.hi[{a}] = {e};")
            else:
                out.append(
                    f"  r.lo[{a}] = (int)(index % {parts}u) * {t}; r.hi[{a}] = min(r.lo[{a}] + {t}, {e}); index /= {parts}u;"
                )
        return "\n  ".join([*out, "  return r;", "}"])

    def product(self, axes: range) -> str:
        return " * ".join(self.space.count(a) for a in axes) or "1"

    def points(self, axes: range) -> tuple[str, Space]:
        """`batches()` and `at_batch()`: the points of `axes` in the tile, one at a time; and the space of one point."""
        lines = [f"static __device__ __forceinline__ int batches(const Range& r) {{ return {self.product(axes)}; }}",
                 "static __device__ __forceinline__ Range at_batch(Range r, int i) {"]  # fmt: skip
        tile = list(self.tile)
        for a in reversed(axes):
            if self.tile[a] > 1:
                tile[a] = 1
                c = self.space.count(a)
                lines.append(f"  r.lo[{a}] += i % {c}; r.hi[{a}] = r.lo[{a}] + 1; i /= {c};")
        return "\n  ".join([*lines, "  return r;", "}"]), Space(self.extent, tile)

    def function(self, name: str, arguments: str, codes: Iterable[int], scratch: dict[int, Scratch], space: Space | None = None,
                 spans: tuple[Span, ...] = ()) -> str:  # fmt: skip
        even = frozenset(n for n, x in enumerate(aligned(self.p, self.op)) if x)
        e = Emitter(self.p, space or self.space, self.n, even)
        for n in codes:
            e.code(n, scratch, spans)
        head = f"static __device__ __forceinline__ void {name}(Worker& w, const Desc& d, const Range& r{arguments}) {{"
        return "\n  ".join([head, *e.out.text, "}"])

    def offset(self, x: np.void, axes: range, space: Space) -> str:
        terms = [
            f"(i64){space.lo(a)} * {int(x['stride'][a])}" for a in axes if int(x["stride"][a]) and space.lo(a) != "0"
        ]
        return " + ".join([*terms, str(int(x["offset"]))])

    def body(self, call: str, *parts: str, **constants: object) -> str:
        consts = [
            f"static constexpr {'bool' if isinstance(v, bool) else 'int'} {k} = {str(v).lower()};"
            for k, v in constants.items()
        ]
        inner = "\n".join([*consts, *parts]).replace("\n", "\n  ")
        return f"// call: {call}\nstruct @ {{\n  {inner}\n}};\n"

    def place(self, name: str, which: str, nbytes: int, at: int, spill: int) -> str:
        """A function that gives scratch `name`: `nbytes` from byte `at` of shared memory `which`, or of the spill."""
        where = f"w.spill + {spill}" if spill >= 0 else f"w.{which} + {at}"
        return f"static __device__ __forceinline__ u8* {name}(Worker& w) {{ return {where}; }}"


def instructions(p: abi.Program, codes: Iterable[int]) -> Iterator[tuple[np.void, np.void]]:
    """Every instruction with its code."""
    for n in codes:
        c = p["Code"][n]
        for s in p["Stage"][int(c["stage"]) : int(c["stage"]) + int(c["stages"])]:
            for i in p["Instr"][int(s["first"]) : int(s["first"]) + int(s["count"])]:
                yield c, i


def slots_of(p: abi.Program, codes: Iterable[int], prefix: str) -> set[int]:
    """The slots that instructions of this kind touch."""
    ops = abi.ENUMS["Opcode"]
    return {int(p["Access"][int(c["access"]) + int(i["aux"])]["slot"]) for c, i in instructions(p, codes)
            if ops[int(i["op"])].startswith(prefix)}  # fmt: skip


def has(p: abi.Program, codes: Iterable[int], op: str) -> bool:
    number = abi.enum("Opcode", op)
    return any(int(i["op"]) == number for _, i in instructions(p, codes))


def reduces(p: abi.Program, codes: Iterable[int]) -> bool:
    """Whether one of these codes has a reduction."""
    stages = ((int(p["Code"][n]["stage"]), int(p["Code"][n]["stages"])) for n in codes)
    return any((p["Stage"]["kind"][s : s + count] == abi.enum("StageKind", "REDUCE")).any() for s, count in stages)
