"""Predicted microseconds of lists of `Piece`s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jax_mpk.predict.constants import Constants, Rate
from jax_mpk.predict.piece import Piece


@dataclass(frozen=True)
class Time:
    """Predicted microseconds, by what they are spent on. launch: the call, kernels, and hops. scalar: what is fused to
    contractions."""

    launch: float = 0.0
    bytes: float = 0.0
    work: float = 0.0
    scalar: float = 0.0

    @property
    def us(self) -> float:
        return self.launch + self.bytes + self.work + self.scalar

    def __add__(self, other: Time) -> Time:
        return Time(self.launch + other.launch, self.bytes + other.bytes, self.work + other.work,
                    self.scalar + other.scalar)  # fmt: skip

    def times(self, n: float) -> Time:
        return Time(self.launch * n, self.bytes * n, self.work * n, self.scalar * n)


def xla(pieces: Sequence[Piece], c: Constants) -> Time:
    """Kernels one after the other."""
    return sum((kernel(p, c) for p in pieces), Time(launch=c.xla.start))


def kernel(p: Piece, c: Constants) -> Time:
    """A kernel of XLA, all the times that it runs."""
    r = c.xla.rate(p.how, p.rows)
    return _spent(r, p.bytes / r.bandwidth, (p.work or p.scalar) / r.work).times(p.count)


def megakernel(pieces: Sequence[Piece], c: Constants) -> Time:
    """Operators one after the other, each on all workers, with a hop after every level; in the calling thread if that is
    short."""
    alone = sum((operator(p, c, 1) for p in pieces), Time(launch=c.mpk.start))
    if alone.us <= c.alone:
        return alone
    hops = 1 + max((p.level for p in pieces), default=0)
    return sum((operator(p, c, c.workers) for p in pieces), Time(launch=c.mpk.start + c.hop * hops))


def operator(p: Piece, c: Constants, workers: int) -> Time:
    """An operator on so many of the device's workers. They take its tasks in turns, and the last turn may be for few."""
    r = c.mpk.rate(p.how, p.rows)
    slower = math.ceil(p.tasks / workers) / p.tasks * c.workers
    work = p.work / r.work if p.work else p.scalar / r.work
    fused = p.scalar / c.scalar if p.work else 0.0
    return _spent(r, p.bytes / r.bandwidth * slower, work * slower) + Time(scalar=fused * slower)


def _spent(r: Rate, nbytes: float, work: float) -> Time:
    if not r.overlap:
        return Time(r.us, nbytes, work)
    return Time(r.us, nbytes, 0.0) if nbytes >= work else Time(r.us, 0.0, work)
