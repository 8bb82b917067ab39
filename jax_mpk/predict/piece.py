"""What one kernel of XLA, or one operator of a megakernel, does: the unit in which time is predicted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """how: what its work is paid as: a name in `constants.Rates`. name: for people. read, written: distinct bytes. work:
    multiply-adds. scalar: other work per element; an addition or a load is 1. rows: of the left side of a contraction.
    tasks: parts that can run at once. level: its hop, from 0. count: how often it runs."""

    how: str
    name: str
    read: int = 0
    written: int = 0
    work: int = 0
    rows: int = 1
    scalar: int = 0
    tasks: int = 1
    level: int = 0
    count: int = 1

    @property
    def bytes(self) -> int:
        return self.read + self.written


def dump(pieces: Sequence[Piece]) -> bytes:
    """The pieces as text."""
    return json.dumps([dataclasses.astuple(p) for p in pieces]).encode()


def parse(data: bytes) -> tuple[Piece, ...]:
    """The pieces that `dump` wrote; `ValueError` for anything else."""
    rows = json.loads(data)
    types = [f.type for f in dataclasses.fields(Piece)]
    if not isinstance(rows, list):
        raise ValueError("not a list of pieces")
    for row in rows:
        ok = isinstance(row, list) and len(row) == len(types)
        if not ok or any(type(x).__name__ != t for x, t in zip(row, types, strict=True)):
            raise ValueError(f"not a piece: {str(row)[:80]}")
    return tuple(Piece(*row) for row in rows)
