"""The struct of one task variant: constants and functions that the kernels of `cuda/` are instantiated with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jax_mpk.backends.cuda.nest import Writer
from jax_mpk.backends.cuda.space import Scratch, Space, Span
from jax_mpk.ir.body import Body, Nest
from jax_mpk.ir.place import Place
from jax_mpk.kinds.bound import Bound

HEAD = "static __device__ __forceinline__"


class Struct:
    """Prints one variant. aligned: the slots that start at multiples of 16 bytes."""

    def __init__(self, bound: Bound, body: Body, aligned: frozenset[int]):
        self.bound, self.body, self.aligned = bound, body, aligned
        self.extent = [x.extent for x in bound.axes]
        self.tile = [max(1, min(t, e)) for t, e in zip(bound.tile, self.extent, strict=True)]
        self.n = len(self.extent)
        self.space = Space(self.extent, self.tile)

    def axes(self, *roles: str) -> list[int]:
        """The numbers of the loop axes of these roles, in the order of the roles."""
        return [self.bound.number[a] for a in self.bound.roles(*roles)]

    def writer(self, space: Space | None = None) -> Writer:
        return Writer(self.bound.number, space or self.space, self.aligned)

    def stride(self, p: Place, axis: int) -> int:
        """The stride of a place along the axis of that number."""
        return p.strides.get(self.bound.axes[axis].axis, 0)

    # ------------------------------------------------------------------------------------------------------- functions

    def range(self) -> str:
        """`range(index)`: the bounds of every axis of a task."""
        out = [f"struct Range {{ int lo[{max(self.n, 1)}], hi[{max(self.n, 1)}]; }};",
               f"{HEAD} Range range(u32 index) {{", "  Range r;"]  # fmt: skip
        for a in reversed(range(self.n)):
            e, t = self.extent[a], self.tile[a]
            parts = -(-e // t)
            if parts == 1:
                out.append(f"  r.lo[{a}] = 0; r.hi[{a}] = {e};")
            else:
                out.append(f"  r.lo[{a}] = (int)(index % {parts}u) * {t}; "
                           f"r.hi[{a}] = min(r.lo[{a}] + {t}, {e}); index /= {parts}u;")  # fmt: skip
        return "\n  ".join([*out, "  return r;", "}"])

    def product(self, axes: Iterable[int]) -> str:
        return " * ".join(self.space.count(a) for a in axes) or "1"

    def points(self, axes: list[int]) -> tuple[str, Space]:
        """`batches()` and `at_batch()`: the points of `axes` in the tile, one at a time; and the space of one point."""
        lines = [f"{HEAD} int batches(const Range& r) {{ return {self.product(axes)}; }}",
                 f"{HEAD} Range at_batch(Range r, int i) {{"]  # fmt: skip
        tile = list(self.tile)
        for a in reversed(axes):
            if self.tile[a] > 1:
                tile[a] = 1
                count = f"const int n{a} = {self.space.count(a)};"  # of the tile, before it becomes a point
                lines.append(f"  {count} r.lo[{a}] += i % n{a}; r.hi[{a}] = r.lo[{a}] + 1; i /= n{a};")
        return "\n  ".join([*lines, "  return r;", "}"]), Space(self.extent, tile)

    def function(self, name: str, arguments: str, nests: Iterable[Nest], scratch: Mapping[int, Scratch],
                 space: Space | None = None, spans: tuple[Span, ...] = (), first: str = "") -> str:  # fmt: skip
        """A function of (worker, task, range, `arguments`) that runs nests; `first`: a statement before them."""
        w = self.writer(space)
        if first:
            w.out(first)
        for x in nests:
            w.nest(x, scratch, spans)
        return self.wrap(f"void {name}(Worker& w, const Desc& d, const Range& r{arguments})", w)

    def wrap(self, signature: str, w: Writer) -> str:
        return "\n  ".join([f"{HEAD} {signature} {{", *w.out.text, "}"])

    def pick(self, signature: str, what: str) -> str:
        """A function that returns one expression."""
        return f"{HEAD} {signature} {{ return {what}; }}"

    def scratch(self, name: str, which: str, at: int, spill: int) -> str:
        """A function that gives scratch `name`: from byte `at` of shared memory `which`, or of the spill."""
        return self.pick(f"u8* {name}(Worker& w)", f"w.spill + {spill}" if spill >= 0 else f"w.{which} + {at}")

    def offset(self, p: Place, axes: Iterable[int], space: Space | None = None) -> str:
        """The element at which a place starts, at the first index of these axes."""
        s = space or self.space
        terms = [f"(i64){s.lo(a)} * {self.stride(p, a)}" for a in axes if self.stride(p, a) and s.lo(a) != "0"]
        return " + ".join([*terms, str(p.offset)])

    def text(self, *parts: str, **constants: object) -> str:
        """The struct, whose name is still `@`."""
        consts = [f"static constexpr {'bool' if isinstance(v, bool) else 'int'} {k} = {str(v).lower()};"
                  for k, v in constants.items()]  # fmt: skip
        inner = "\n".join([*consts, *parts]).replace("\n", "\n  ")
        return f"struct @ {{\n  {inner}\n}};\n"
