"""Strided boxes of bytes: canonical form, expansion of a grid's accesses, and exact overlap.

A box is `{offset + sum_d j_d * stride[d] + [0, run)}`. In canonical form strides descend and every stride is at least
the span of everything below it, so the pieces are disjoint and lie in memory in the lexicographic order of `j`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mpk.ir.tasks import BOX_RANK, READ, WRITE, Boxes

PIECES = 1 << 16
"""A pair of boxes whose smaller member has more contiguous pieces than this is compared by hull only (conservative)."""

Shape = tuple[int, int, tuple[tuple[int, int], ...]]
"""Offset, run, and (count, stride) of the strided dimensions, outermost first."""


def canonical(run: int, dims: list[tuple[int, int]], exact: bool, offset: int = 0) -> list[Shape]:
    """The boxes whose union is `{offset + sum j*stride + [0, run)}` for (count, stride) in `dims`, any signs and order.

    Not `exact`: one box, which covers at least that set and nothing outside its hull.
    """
    if run == 0 or any(c <= 0 for c, _ in dims):
        return []
    offset += sum((c - 1) * s for c, s in dims if s < 0)
    todo = sorted(((c, abs(s)) for c, s in dims if c > 1 and s), key=lambda d: d[1])
    whole = run
    levels: list[tuple[int, int]] = []  # innermost first
    for n, (c, s) in enumerate(todo):
        span = whole + sum((k - 1) * t for k, t in levels)
        if not levels and s <= whole:
            whole += (c - 1) * s
        elif levels and s % levels[-1][1] == 0 and s <= levels[-1][0] * levels[-1][1]:
            count, stride = levels[-1]
            levels[-1] = (count + (c - 1) * (s // stride), stride)
        elif s >= span:
            levels.append((c, s))
        elif not exact:
            whole, levels = span + (c - 1) * s, []
        else:
            return _split(run, todo, n, offset)
    while len(levels) > BOX_RANK:
        if exact:
            return _split(run, todo, min(range(len(todo)), key=lambda n: todo[n][0]), offset)
        (c, s), *levels = levels
        whole += (c - 1) * s
        while levels and levels[0][1] <= whole:
            (c, s), *levels = levels
            whole += (c - 1) * s
    return [(offset, whole, tuple(reversed(levels)))]


def _split(run: int, dims: list[tuple[int, int]], n: int, offset: int) -> list[Shape]:
    """Canonical boxes, one per index of dimension `n`."""
    rest = dims[:n] + dims[n + 1 :]
    return [x for j in range(dims[n][0]) for x in canonical(run, rest, True, offset + j * dims[n][1])]


@dataclass(frozen=True)
class Touch:
    """One access of an operator. `dims`: (loop axis or -1, stride in bytes, lo, hi); the index runs over lo..hi-1."""

    slot: int
    mode: int
    item: int
    offset: int
    dims: tuple[tuple[int, int, int, int], ...]


def expand(extent: tuple[int, ...], tile: tuple[int, ...], touches: tuple[Touch, ...]) -> Boxes:
    """The boxes of every task of a grid; `task` is the grid index, `buffer` the slot."""
    parts = tuple(math.ceil(e / t) for e, t in zip(extent, tile, strict=True))
    tasks = math.prod(parts)
    digits = np.unravel_index(np.arange(tasks), parts) if parts else ()
    rows = [np.zeros((0, 5 + 2 * BOX_RANK), np.int64)]
    for x in touches if tasks else ():
        offset = np.full(tasks, x.offset, np.int64)
        counts = np.empty((tasks, len(x.dims)), np.int64)
        for d, (axis, stride, lo, hi) in enumerate(x.dims):
            first, last = np.full(tasks, lo), np.full(tasks, hi)
            if axis >= 0 and parts[axis] > 1:
                first = np.maximum(lo, digits[axis] * tile[axis])
                last = np.minimum(hi, (digits[axis] + 1) * tile[axis])
            offset += first * stride
            counts[:, d] = last - first
        kinds, kind = np.unique(counts, axis=0, return_inverse=True) if x.dims else (counts[:1], np.zeros(tasks, int))
        for n, count in enumerate(kinds.tolist()):
            task = np.flatnonzero(kind.reshape(-1) == n)
            shape = [(c, d[1]) for c, d in zip(count, x.dims, strict=True)]
            for at, run, dims in canonical(x.item, shape, x.mode == WRITE):
                pad = [(1, 0)] * (BOX_RANK - len(dims))
                tail = [run, *(c for c, _ in (*dims, *pad)), *(s for _, s in (*dims, *pad))]
                head = np.column_stack([task, np.full((len(task), 2), (x.slot, x.mode)), offset[task] + at])
                rows.append(np.hstack([head, np.broadcast_to(np.array(tail, np.int64), (len(task), len(tail)))]))
    return from_rows(np.unique(np.concatenate(rows), axis=0))


def rows_of(b: Boxes) -> np.ndarray:
    """A box a row: task, buffer, mode, offset, run, counts, strides (i64)."""
    return np.column_stack([b.task, b.buffer, b.mode, b.offset, b.run, b.count, b.stride]).astype(np.int64, copy=False)


def from_rows(r: np.ndarray) -> Boxes:
    """The inverse of `rows_of`."""
    return Boxes(r[:, 0].astype(np.int32), r[:, 1].astype(np.int32), r[:, 2].astype(np.uint8), r[:, 3], r[:, 4],
                 r[:, 5 : 5 + BOX_RANK], r[:, 5 + BOX_RANK :])  # fmt: skip


def take(b: Boxes, rows: np.ndarray) -> Boxes:
    """The boxes at these rows (indices or a mask)."""
    return Boxes(*(getattr(b, f)[rows] for f in ("task", "buffer", "mode", "offset", "run", "count", "stride")))


def bytes_of(b: Boxes) -> np.ndarray:
    """Bytes in each box."""
    out: np.ndarray = b.run * b.count.prod(axis=1)
    return out


def ends(b: Boxes) -> np.ndarray:
    """The end of each box's hull."""
    out: np.ndarray = b.offset + b.run + ((b.count - 1) * b.stride).sum(axis=1)
    return out


# ------------------------------------------------------------------------------------------------------------- overlap


def conflicts(a: Boxes, b: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row of a, row of b) of boxes that overlap and of which one is written; all boxes are of one buffer."""
    wa, wb = np.flatnonzero(a.mode != READ), np.flatnonzero(b.mode != READ)
    ra = np.flatnonzero(a.mode == READ)
    i, j = overlaps(take(a, wa), b)
    k, m = overlaps(take(a, ra), take(b, wb))
    return np.concatenate([wa[i], ra[k]]), np.concatenate([j, wb[m]])


def overlaps(a: Boxes, b: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row of a, row of b) of boxes that share a byte."""
    if not len(a) or not len(b):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    both = Boxes(*(np.concatenate([getattr(a, f), getattr(b, f)]) for f in Boxes.__dataclass_fields__))
    digits = _digits(both)
    if digits is not None:
        lo, hi = digits
        return _join(lo[: len(a)], hi[: len(a)], lo[len(a) :], hi[len(a) :])
    i, j = _join(a.offset[:, None], ends(a)[:, None], b.offset[:, None], ends(b)[:, None])
    hit = _pairs(take(a, i), take(b, j))
    return i[hit], j[hit]


def _digits(b: Boxes) -> tuple[np.ndarray, np.ndarray] | None:
    """The boxes as products of intervals over the mixed-radix digits of an address, or None if one is no product.

    The radices are the strides that occur, if each divides the next larger one.
    """
    strides = np.unique(b.stride[b.count > 1])[::-1]
    if len(strides) > 2 * BOX_RANK or np.any(strides[:-1] % strides[1:]):
        return None
    n, depth = len(b), len(strides)
    lo = np.zeros((n, depth + 1), np.int64)
    size = np.ones((n, depth + 1), np.int64)
    rest = b.offset.copy()
    for d, s in enumerate(strides):
        lo[:, d], rest = rest // s, rest % s
        size[:, d] = np.where((b.stride == s) & (b.count > 1), b.count, 1).prod(axis=1)
    lo[:, depth], size[:, depth] = rest, b.run
    for d in range(depth, 0, -1):  # an interval of whole digits is carried into the next digit
        radix = int(strides[d - 1] // (strides[d] if d < depth else 1))
        whole = (lo[:, d] == 0) & (size[:, d] % radix == 0) & (size[:, d - 1] == 1)
        size[:, d - 1] = np.where(whole, size[:, d] // radix, size[:, d - 1])
        size[:, d] = np.where(whole, radix, size[:, d])
        if np.any(lo[:, d] + size[:, d] > radix):
            return None
    return lo, lo + size


def _join(alo: np.ndarray, ahi: np.ndarray, blo: np.ndarray, bhi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of multi-dimensional intervals [lo, hi) that meet: a sorted join on the most selective dimension."""
    best: tuple[int, int, np.ndarray, np.ndarray, np.ndarray] | None = None
    for d in range(alo.shape[1]):
        order = np.argsort(blo[:, d], kind="stable")
        sorted_lo, longest = blo[order, d], int((bhi[:, d] - blo[:, d]).max())
        left = np.searchsorted(sorted_lo, alo[:, d] - longest, "right")
        right = np.searchsorted(sorted_lo, ahi[:, d], "left")
        total = int(np.maximum(right - left, 0).sum())
        if best is None or total < best[0]:
            best = (total, d, order, left, np.maximum(right, left))
    assert best is not None
    _, _, order, left, right = best
    i, j = ragged(left, right)
    j = order[j]
    hit = ((alo[i] < bhi[j]) & (blo[j] < ahi[i])).all(axis=1)
    return i[hit], j[hit]


def ragged(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, value) for every value of `left[row] .. right[row]-1`."""
    size = right - left
    row = np.repeat(np.arange(len(size)), size)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(size) - size - left, size)


def _floor(b: Boxes, point: np.ndarray) -> np.ndarray:
    """The start of the last piece at or before `point`; meaningless where `point` is before the box."""
    rest, start = point - b.offset, b.offset.copy()
    for d in range(BOX_RANK):
        q = np.clip(rest // np.maximum(b.stride[:, d], 1), 0, b.count[:, d] - 1)
        rest = rest - q * b.stride[:, d]
        start += q * b.stride[:, d]
    return start


def _pairs(a: Boxes, b: Boxes) -> np.ndarray:
    """Whether a[n] and b[n] share a byte: the pieces of the one with fewer pieces against the other box."""
    swap = a.count.prod(axis=1) > b.count.prod(axis=1)
    few = Boxes(*(_where(swap, getattr(b, f), getattr(a, f)) for f in Boxes.__dataclass_fields__))
    many = Boxes(*(_where(swap, getattr(a, f), getattr(b, f)) for f in Boxes.__dataclass_fields__))
    pieces = few.count.prod(axis=1)
    hit: np.ndarray = pieces > PIECES
    for chunk in np.array_split(np.flatnonzero(~hit), max(1, math.ceil(pieces[~hit].sum() / (1 << 20)))):
        x, y = take(few, chunk), take(many, chunk)
        n, j = ragged(np.zeros_like(chunk), pieces[chunk])
        start = x.offset[n]
        for d in reversed(range(BOX_RANK)):
            start = start + j % x.count[n, d] * x.stride[n, d]
            j = j // x.count[n, d]
        end = start + x.run[n]
        y = take(y, n)
        last = _floor(y, end - 1)
        hit[chunk[n[(end > y.offset) & (last + y.run > start)]]] = True
    return hit


def _where(mask: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(mask if a.ndim == 1 else mask[:, None], a, b)
