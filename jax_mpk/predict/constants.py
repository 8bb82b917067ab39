"""What a device takes for a `Piece`, in microseconds: numbers, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

ANY = 1 << 62


@dataclass(frozen=True)
class Rate:
    """us: of a kernel that does nothing. bandwidth: bytes a us. work: multiply-adds, or units of scalar work, a us, of the
    whole device. worker: bytes a us of one worker alone (0: its share). near: bytes a us where the whole function's operands fit in a cache (0: the same). rows: up to how many rows of a contraction this holds. overlap: bytes and work take the longer of their
    times, not the sum."""

    us: float = 0.0
    bandwidth: float = math.inf
    work: float = math.inf
    rows: int = ANY
    overlap: bool = False
    near: float = 0.0
    worker: float = 0.0

    def slower(self, start: float, memory: float, work: float) -> Rate:
        """Of a device whose calls, memory and arithmetic take so many times as long."""
        return replace(self, us=self.us * start, bandwidth=self.bandwidth / memory, near=self.near / memory,
                       worker=self.worker / memory, work=self.work / work)  # fmt: skip


Rates = Mapping[str, tuple[Rate, ...]]
"""By `Piece.how`, or its first word, or "" for what has no entry; of several, the first with enough rows."""


@dataclass(frozen=True)
class Side:
    """What XLA, or the megakernel, takes. start: us of a call."""

    start: float
    rates: Rates

    def rate(self, how: str, rows: int = 1) -> Rate:
        found = self._rates(how)
        return next((r for r in found if rows <= r.rows), found[-1])

    def work(self, how: str, rows: int, work: float) -> float:
        """us of the work. More rows never take less than fewer, where a device is bad at few."""
        found = self._rates(how)
        fewer = (work * r.rows / rows / r.work for r in found if r.rows < rows)
        return max(work / self.rate(how, rows).work, *fewer, 0.0)

    def _rates(self, how: str) -> tuple[Rate, ...]:
        return self.rates.get(how) or self.rates.get(how.split()[0]) or self.rates[""]

    def slower(self, start: float, memory: float, work: float) -> Side:
        """See `Rate.slower`."""
        return Side(
            self.start * start, {k: tuple(r.slower(start, memory, work) for r in v) for k, v in self.rates.items()}
        )


@dataclass(frozen=True)
class Constants:
    """name: of the device. source: where the numbers are from. workers: of the megakernel. alone: us up to which a launch
    stays in the calling thread (0: never). cache: bytes of the cache that `Rate.near` is about. ahead: bytes that
    a worker streams before it may use them. hop: us between dependent operators. level: us of a hop and the
    operators before it, at least. scalar: units of scalar work a us that is
    fused to contractions and attentions. margin, gain: how many times and us faster the megakernel must be predicted to
    be."""

    name: str
    source: str
    workers: int
    xla: Side
    mpk: Side
    alone: float
    hop: float
    scalar: float
    margin: float
    cache: int = 0
    ahead: int = 0
    level: float = 0.0
    gain: float = 0.0

    def slower(self, start: float, memory: float, work: float, source: str) -> Constants:
        """See `Rate.slower`."""
        return replace(self, source=source, xla=self.xla.slower(start, memory, work), mpk=self.mpk.slower(start, memory, work),
                       hop=self.hop * start, level=self.level * start, scalar=self.scalar / work)  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.source}: {self.workers} workers, a hop {self.hop:.3g} us, a level {self.level:.3g} us at least, alone up to {self.alone:.3g} us, "
                 f"fused scalar work {self.scalar:.3g}/us, margin {self.margin:.3g} and {self.gain:.3g} us"]  # fmt: skip
        for label, s in (("XLA", self.xla), ("megakernel", self.mpk)):
            lines.append(f"{label}: {s.start:.3g} us a call")
            for how, rates in s.rates.items():
                for r in rates:
                    rows = f"up to {r.rows} rows" if r.rows < ANY else ""
                    lines.append(
                        f"  {how or 'anything else':16} {rows:16} {r.us:6.3g} us {r.bandwidth / 1e3:8.3g} GB/s {r.work:10.3g}/us"
                    )
        return "\n".join(lines)
