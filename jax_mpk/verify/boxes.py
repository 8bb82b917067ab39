"""Exact set arithmetic on strided boxes.

Boxes of one memory are cut into *rectangles* of a mixed-radix number system whose radices come from the strides that
the boxes use: a column tile of a row-major matrix is one rectangle, however many rows it has. Two rectangles overlap
when their digits do, axis by axis, so an intersection costs a few comparisons and its size is a product. Whatever does
not fit (a stride that divides no other, a run that wraps around a row) is cut into more rectangles: still exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.ir.tasks import BOX_RANK, READ, Boxes

DENSE_JOIN = 1 << 14
"""Up to this many pairs are compared without an index."""
BLOCK = 1 << 21
"""Pairs compared at a time: bounds the memory of a join."""


@dataclass(frozen=True)
class Shapes:
    """Boxes in a canonical form: dimensions sorted by stride, strides positive, unused ones (1, 0), runs merged."""

    offset: np.ndarray  # [n]
    run: np.ndarray  # [n]
    count: np.ndarray  # [n, BOX_RANK]
    stride: np.ndarray  # [n, BOX_RANK]

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, rows: np.ndarray) -> Shapes:
        return Shapes(self.offset[rows], self.run[rows], self.count[rows], self.stride[rows])

    @property
    def size(self) -> np.ndarray:
        """Bytes of every box."""
        out: np.ndarray = self.run * self.count.prod(1)
        return out

    @property
    def end(self) -> np.ndarray:
        """One past the last byte of every box."""
        out: np.ndarray = self.offset + ((self.count - 1) * self.stride).sum(1) + self.run
        return out

    def columns(self) -> list[np.ndarray]:
        """The columns that together identify a box."""
        return [self.offset, self.run, *self.count.T, *self.stride.T]


def concatenate(shapes: Sequence[Shapes]) -> Shapes:
    """One list of boxes after the other."""
    return Shapes(*(np.concatenate(column) for column in zip(*(vars(x).values() for x in shapes), strict=True)))


def canonical(boxes: Boxes) -> Shapes:
    """The same sets of bytes in canonical form; the boxes must have positive runs and counts.

    Reads may overlap themselves (a sliding window, a broadcast); those along one stride become a longer run here.
    """
    offset, run = boxes.offset.astype(np.int64), boxes.run.astype(np.int64)
    count, stride = boxes.count.astype(np.int64), boxes.stride.astype(np.int64)
    used = np.flatnonzero((count > 1).any(1))
    c, s = count[used], stride[used]
    s[c == 1] = 0
    offset[used] += ((c - 1) * np.minimum(s, 0)).sum(1)
    s = np.abs(s)
    by = np.argsort(s, axis=1, kind="stable")
    c, s = np.take_along_axis(c, by, 1), np.take_along_axis(s, by, 1)
    r, read = run[used], boxes.mode[used] == READ
    for d in range(BOX_RANK):
        touch = (c[:, d] > 1) & ((s[:, d] == r) | (read & (s[:, d] < r)))
        r[touch] += (c[touch, d] - 1) * s[touch, d]
        c[touch, d], s[touch, d] = 1, 0
    run[used], count[used] = r, c
    stride = np.zeros_like(count)
    stride[used] = s
    return Shapes(offset, run, count, stride)


def self_overlaps(x: Shapes) -> np.ndarray:
    """Rows whose pieces overlap each other."""
    rows = np.flatnonzero((x.count > 1).any(1))
    span, nested = x.run[rows].copy(), np.ones(len(rows), bool)
    for d in range(BOX_RANK):
        c, s = x.count[rows, d], x.stride[rows, d]
        nested &= (c == 1) | (s >= span)
        span += (c - 1) * s
    return np.array([r for r in rows[~nested] if _collides(x, r)], np.int64)


def _collides(x: Shapes, row: int) -> bool:
    if x.size[row] > x.end[row] - x.offset[row]:
        return True  # more bytes than there is room for: no need to list the pieces
    return bool((np.diff(np.sort(starts(x, row))) < x.run[row]).any())


def starts(x: Shapes, row: int) -> np.ndarray:
    """Offsets of the pieces of one box."""
    at = x.offset[row : row + 1]
    for c, s in zip(x.count[row], x.stride[row], strict=True):
        at = (at[:, None] + np.arange(c) * s).ravel()
    return at


@dataclass(frozen=True)
class Rects:
    """Rectangles `lo <= digit < hi` over the radices `unit` (bytes); `own` is the box that each is a part of."""

    unit: np.ndarray  # [axes]
    own: np.ndarray  # [n]
    lo: np.ndarray  # [n, axes]
    hi: np.ndarray  # [n, axes]

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, rows: np.ndarray) -> Rects:
        return Rects(self.unit, self.own[rows], self.lo[rows], self.hi[rows])

    def of(self, owners: np.ndarray) -> Rects:
        """The rectangles of the boxes that the mask `owners` selects."""
        return self[owners[self.own]]

    def meet(self, i: np.ndarray, other: Rects, j: np.ndarray, own: np.ndarray | None = None) -> Rects:
        """Intersections of pairs of rectangles, owned by the number of the pair by default."""
        own = np.arange(len(i)) if own is None else own
        return Rects(self.unit, own, np.maximum(self.lo[i], other.lo[j]), np.minimum(self.hi[i], other.hi[j]))

    @property
    def size(self) -> np.ndarray:
        out: np.ndarray = (self.hi - self.lo).prod(1)
        return out

    def span(self) -> tuple[np.ndarray, np.ndarray]:
        """First byte, and one past the last byte, of every rectangle."""
        return self.lo @ self.unit, (self.hi - 1) @ self.unit + 1

    def first_run(self, n: int) -> tuple[int, int]:
        """The lowest run of bytes in rectangle n."""
        at = int(self.lo[n] @ self.unit)
        return at, at + int(self.hi[n, 0] - self.lo[n, 0])


def rectangles(x: Shapes) -> Rects:
    """Cut boxes of one memory into disjoint rectangles of one number system."""
    unit = _radices(x)
    own = np.arange(len(x))
    axis = np.searchsorted(unit, x.stride).clip(max=len(unit) - 1)
    strange = (x.count > 1) & (unit[axis] != x.stride)
    for d in np.flatnonzero(strange.any(0)):  # list the pieces along strides that are no radix
        many = strange[own, d]
        row, j = ragged(np.where(many, x.count[:, d], 1))
        own, many, x = own[row], many[row], x[row]
        x.offset[:] += np.where(many, j * x.stride[:, d], 0)
        x.count[many, d] = 1
    n, axes = len(x), len(unit)
    lo, length = np.empty((n, axes), np.int64), np.ones((n, axes), np.int64)
    rest = x.offset
    for a in range(axes - 1, 0, -1):
        lo[:, a] = rest // unit[a]
        rest = rest - lo[:, a] * unit[a]
    lo[:, 0], length[:, 0] = rest, x.run
    rows, dims = np.nonzero(x.count > 1)
    length[rows, axis[own[rows], dims]] = x.count[rows, dims]
    for a in range(axes - 1):
        own, lo, length = _wrap(own, lo, length, a, int(unit[a + 1] // unit[a]))
    return Rects(unit, own, lo, lo + length)


def _wrap(own: np.ndarray, lo: np.ndarray, length: np.ndarray, a: int, radix: int) -> tuple[np.ndarray, ...]:
    """Cut where digit `a` passes `radix`, and carry: first part, whole turns (which become a length along a+1), rest.

    Whole turns imply that nothing else runs along a+1, or else the pieces of the box would overlap.
    """
    if not (lo[:, a] + length[:, a] > radix).any():
        return own, lo, length
    carry = lo[:, a] // radix
    lo[:, a] -= carry * radix
    lo[:, a + 1] += carry
    end = lo[:, a] + length[:, a]
    over = end > radix
    parts = [(own[~over], lo[~over], length[~over])]
    own, lo, length, end = own[over], lo[over], length[over], end[over]
    head = lo[:, a] > 0
    turns, tail = end // radix - head, end % radix
    if (length[turns > 0, a + 1] > 1).any():
        raise ValueError("the pieces of a box overlap")
    for keep, shift, start, n, up in (
        (head, 0, lo[:, a], radix - lo[:, a], length[:, a + 1]),
        (turns > 0, head, 0 * turns, 0 * turns + radix, turns),
        (tail > 0, head + turns, 0 * turns, tail, length[:, a + 1]),
    ):
        part_lo, part_length = lo.copy(), length.copy()
        part_lo[:, a], part_length[:, a] = start, n
        part_lo[:, a + 1] += shift
        part_length[:, a + 1] = up
        parts.append((own[keep], part_lo[keep], part_length[keep]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _radices(x: Shapes) -> np.ndarray:
    """A divisibility chain of strides, 1 first; of strides that exclude each other, the one with more pieces."""
    used = x.count > 1
    pieces: dict[int, int] = {}
    for s, n in zip(x.stride[used].tolist(), x.count[used].tolist(), strict=True):
        pieces[s] = pieces.get(s, 0) + n
    chain = [1]
    for s in sorted(pieces, key=lambda s: (-pieces[s], s)):
        if all(s % c == 0 or c % s == 0 for c in chain):
            chain.append(s)
    return np.array(sorted(chain), np.int64)


def ragged(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and position within the row for every entry of a ragged array with row lengths `n`."""
    row = np.repeat(np.arange(len(n)), n)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(n) - n, n)


def join(a: Rects, b: Rects) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) such that rectangle i of `a` and rectangle j of `b` overlap."""
    if not len(a) or not len(b):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(a) * len(b) <= DENSE_JOIN:
        hit = (a.lo[:, None, 0] < b.hi[None, :, 0]) & (b.lo[None, :, 0] < a.hi[:, None, 0])
        for d in range(1, len(a.unit)):
            hit &= (a.lo[:, None, d] < b.hi[None, :, d]) & (b.lo[None, :, d] < a.hi[:, None, d])
        i, j = np.nonzero(hit)
        return i, j
    # Candidates by intervals along one axis (or along the address), whichever leaves the fewest.
    options = [_candidates(a.lo[:, d], a.hi[:, d], b.lo[:, d], b.hi[:, d]) for d in range(len(a.unit))]
    options.append(_candidates(*a.span(), *b.span()))
    by, first, n = min(options, key=lambda o: int(o[2].sum()))
    found = []
    block = np.cumsum(n) // BLOCK
    for k in np.unique(block):
        some = np.flatnonzero(block == k)
        row, at = ragged(n[some])
        j, i = some[row], by[first[some][row] + at]
        ok = np.ones(len(i), bool)
        for d in range(len(a.unit)):
            ok &= (a.lo[i, d] < b.hi[j, d]) & (b.lo[j, d] < a.hi[i, d])
        found.append((i[ok], j[ok]))
    return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])


def _candidates(lo: np.ndarray, hi: np.ndarray, from_: np.ndarray, to: np.ndarray) -> tuple[np.ndarray, ...]:
    """Intervals [lo, hi) that may meet each interval [from_, to): a range of the permutation that is returned."""
    by = np.argsort(lo, kind="stable")
    first = np.searchsorted(np.maximum.accumulate(hi[by]), from_, "right")
    return by, first, np.maximum(np.searchsorted(lo[by], to, "left") - first, 0)


def overlaps(x: Shapes, writes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j) of overlapping boxes where i is in the mask `writes`, and the bytes that they share.

    Pairs of two writes are given once, with i <= j; a write is paired with itself. Sorted.
    """
    r = rectangles(x)
    i, j, size = _meetings(r.of(writes), r)
    keep = ~writes[j] | (i <= j)
    return _sum(i[keep], j[keep], size[keep], len(x))


def crossings(
    x: Shapes, y: Shapes, writes_x: np.ndarray, writes_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j) of a box of `x` and an overlapping one of `y`, at least one in its mask, and the bytes they share."""
    r = rectangles(concatenate([x, y]))
    first = np.arange(len(x) + len(y)) < len(x)
    writes = np.concatenate([writes_x, writes_y])
    parts = [_meetings(r.of(first & writes), r.of(~first)), _meetings(r.of(first & ~writes), r.of(~first & writes))]
    i, j, size = (np.concatenate(c) for c in zip(*parts, strict=True))
    return _sum(i, j - len(x), size, len(y))


def _meetings(a: Rects, b: Rects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owners of overlapping rectangles, and the bytes that these share."""
    i, j = join(a, b)
    size = a.meet(i, b, j).size
    return a.own[i], b.own[j], size


def _sum(i: np.ndarray, j: np.ndarray, size: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct pairs, sorted, each with the sum of its sizes; every j is less than n."""
    key = i * n + j
    by = np.argsort(key, kind="stable")
    key, size = key[by], size[by]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    total = np.add.reduceat(size, first) if len(first) else size
    return key[first] // n, key[first] % n, total


def distinct(columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of a table: the first row number of each, and for every row the number of its equal.

    Sorts one hash instead of all columns, and checks the result. The numbering depends on the rows only.
    """
    table = [c.astype(np.int64).view(np.uint64) for c in columns]
    salt = 0x9E3779B97F4A7C15
    while True:
        key = np.zeros(len(table[0]), np.uint64)
        for c in table:
            salt = salt * 0xD1342543DE82EF95 + 2 & (1 << 64) - 1  # odd stays odd
            key = (key ^ c) * np.uint64(salt)
            key ^= key >> np.uint64(29)
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        if all((c[first][inverse] == c).all() for c in table):
            return first, inverse
