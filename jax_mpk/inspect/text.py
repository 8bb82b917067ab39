"""Text for people: tables, sizes, and files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Rows of equal length, a line each, in columns that are aligned to the right but for those in `left`."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(c: int, x: str) -> str:
        return x.ljust(width[c]) if c in left else x.rjust(width[c])

    return "\n".join("  ".join(cell(c, x) for c, x in enumerate(r)).rstrip() for r in rows)


def size(n: float) -> str:
    """A number in three digits: `17`, `4.19M`."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(n) < 1000 or unit == "T":
            return f"{n:.0f}{unit}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError


def written(content: str, file: Any) -> str:
    """The text, also written to the path `file` if there is one."""
    if file is not None:
        Path(file).write_text(content)
    return content
