"""What the code generator of the CUDA backend works with: places of scratch, tiles, loops, names, and lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scratch:
    """Where a scratch slot lives. With `length`, elements go by (row, column) of rows that long in the program's
    layout: `rows` are the axes that make up the row, `ld` the row length here, `row0` and `col0` what to subtract.
    `shared`: it is in shared memory, 16-byte aligned, and so is the element of `col0`."""

    pointer: str
    dtype: str = ""
    length: int = 0
    rows: tuple[int, ...] = ()
    ld: int = 0
    row0: str = "0"
    col0: str = "0"
    shared: bool = False


@dataclass(frozen=True)
class Span:
    """Loop axes taken as one flattened range [lo, hi) of their (full, tile-relative) index space; `size` is hi - lo
    where that is always the same, and then lo is a multiple of it."""

    axes: tuple[int, ...]
    lo: str
    hi: str
    size: int = 0


@dataclass
class Space:
    """The tile of one operator: how an axis' bounds are written, and how many points it can have."""

    extent: Sequence[int]
    tile: Sequence[int]

    def lo(self, a: int) -> str:
        return "0" if self.tile[a] >= self.extent[a] else f"r.lo[{a}]"

    def hi(self, a: int) -> str:
        return str(self.extent[a]) if self.tile[a] >= self.extent[a] else f"r.hi[{a}]"

    def count(self, a: int) -> str:
        if self.tile[a] >= self.extent[a] or self.extent[a] % self.tile[a] == 0:
            return str(min(self.tile[a], self.extent[a]))
        return f"({self.hi(a)} - {self.lo(a)})"

    def grain(self, a: int) -> int:
        """The first index of every tile is a multiple of this (0: it is zero)."""
        return 0 if self.tile[a] >= self.extent[a] else int(self.tile[a])

    def most(self, a: int) -> int:
        return min(int(self.tile[a]), int(self.extent[a]))


@dataclass
class Lines:
    """Text with indentation."""

    text: list[str] = field(default_factory=list)
    depth: int = 1

    def __call__(self, line: str) -> None:
        if line.startswith("}"):
            self.depth -= 1
        self.text.append("  " * self.depth + line)
        if line.endswith("{"):
            self.depth += 1


@dataclass
class Loop:
    """One loop dimension: axis numbers with their extents (several: a span), first value, number of values. The first value
    is a multiple of `grain` (of everything: 0)."""

    axes: tuple[int, ...]
    base: str
    count: str
    most: int
    sizes: tuple[int, ...] = ()
    grain: int = 1
