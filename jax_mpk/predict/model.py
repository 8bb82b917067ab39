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
    near = _near(pieces, c)
    return sum((kernel(p, c, near) for p in pieces), Time(launch=c.xla.start))


def kernel(p: Piece, c: Constants, near: bool = False) -> Time:
    """A kernel of XLA, all the times that it runs. near: the function's operands are in a cache."""
    r = c.xla.rate(p.how, p.rows)
    return _spent(r, p.bytes / _bandwidth(r, near), c.xla.work(p.how, p.rows, p.work or p.scalar)).times(p.count)


def megakernel(pieces: Sequence[Piece], c: Constants) -> Time:
    """Levels one after the other, with a hop after each; in the calling thread if that is short."""
    near = _near(pieces, c)
    alone = sum((operator(p, c, 1, near) for p in pieces), Time(launch=c.mpk.start))
    if alone.us <= c.alone:
        return alone
    tasks = beside(pieces)
    levels = [0.0] * (1 + max((p.level for p in pieces), default=0))
    out = Time(launch=c.mpk.start)
    for p, n in zip(pieces, tasks, strict=True):
        t = operator(p, c, c.workers, near, n)
        levels[p.level] += t.us
        out += t
    return out + Time(launch=sum(max(c.hop, c.level - us) for us in levels))


def beside(pieces: Sequence[Piece]) -> list[int]:
    """Per operator how many tasks of its sort its level has."""
    tasks: dict[tuple[int, str], int] = {}
    keys = [(p.level, p.how.split()[0]) for p in pieces]
    for p, key in zip(pieces, keys, strict=True):
        tasks[key] = tasks.get(key, 0) + p.tasks
    return [tasks[key] for key in keys]


def operator(p: Piece, c: Constants, workers: int, near: bool = False, tasks: int = 0) -> Time:
    """The part of an operator in its level, which has so many tasks (0: its own). So many of the device's workers take them
    in turns, and the last turn may be for few; those that have none stream ahead."""
    r = c.mpk.rate(p.how, p.rows)
    tasks = tasks or p.tasks
    turns = math.ceil(tasks / workers) / tasks
    whole, share = p.bytes / _bandwidth(r, near), r.worker or _bandwidth(r, near) / c.workers
    work = c.mpk.work(p.how, p.rows, p.work or p.scalar)
    fused = p.scalar / c.scalar if p.work else 0.0
    busiest = p.bytes * turns - (0 if r.worker else c.ahead * p.tasks / tasks)
    return _spent(r, max(whole, busiest / share), work * turns * c.workers) + Time(scalar=fused * turns * c.workers)


def _spent(r: Rate, nbytes: float, work: float) -> Time:
    if not r.overlap:
        return Time(r.us, nbytes, work)
    return Time(r.us, nbytes, 0.0) if nbytes >= work else Time(r.us, 0.0, work)


def _near(pieces: Sequence[Piece], c: Constants) -> bool:
    return sum(p.bytes * p.count for p in pieces) <= c.cache


def _bandwidth(r: Rate, near: bool) -> float:
    return r.near if near and r.near else r.bandwidth
