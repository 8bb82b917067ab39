"""Strided boxes against sets of bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mpk.ir import boxes
from jax_mpk.ir.boxes import Touch, canonical, conflicts, expand, from_rows, overlaps
from jax_mpk.ir.tasks import BOX_RANK, READ, UPDATE, WRITE
from tests.unit.graphs_by_hand import box_bytes

dims = st.lists(st.tuples(st.integers(1, 4), st.integers(-24, 24)), max_size=6)


def touched(run: int, d: list[tuple[int, int]], offset: int = 0) -> set[int]:
    out = set()
    for j in itertools.product(*(range(c) for c, _ in d)):
        at = offset + sum(i * s for i, (_, s) in zip(j, d, strict=True))
        out |= set(range(at, at + run))
    return out


def shape_bytes(shape: tuple) -> set[int]:
    at, run, d = shape
    return touched(run, list(d), at)


@given(st.integers(1, 6), dims)
@settings(max_examples=300, deadline=None)
def test_canonical_is_exact_for_writes_and_covers_reads(run, d):
    want = touched(run, d)
    exact = canonical(run, d, True)
    assert set().union(*map(shape_bytes, exact)) == want
    (wide,) = canonical(run, d, False)
    assert want <= shape_bytes(wide)
    assert min(shape_bytes(wide)) == min(want) and max(shape_bytes(wide)) == max(want)
    for at, whole, levels in [*exact, wide]:
        assert len(levels) <= BOX_RANK
        span = whole
        for c, s in reversed(levels):
            assert c > 1 and s >= span, "pieces are disjoint and ordered"
            span += (c - 1) * s
        assert len(shape_bytes((at, whole, levels))) == whole * math.prod(c for c, _ in levels)


def test_canonical_merges_dense_dimensions():
    assert canonical(4, [(3, 40), (10, 4)], True) == [(0, 120, ())]
    assert canonical(4, [(3, 80), (10, 4)], True) == [(0, 40, ((3, 80),))]
    assert canonical(4, [(2, 800), (3, 80), (10, 4)], True) == [(0, 40, ((2, 800), (3, 80)))]
    assert canonical(4, [(2, 240), (3, 80), (10, 4)], True) == [(0, 40, ((6, 80),))]
    assert canonical(4, [(10, -4)], True) == [(-36, 40, ())]
    assert canonical(4, [(0, 4)], True) == []


def random_boxes(rng: np.random.Generator, n: int, layouts: list) -> boxes.Boxes:
    rows = []
    while len(rows) < n:
        d = [(int(rng.integers(1, 4)), s) for s in layouts[rng.integers(len(layouts))]]
        for at, run, levels in canonical(int(rng.integers(1, 9)), d, False, int(rng.integers(0, 150))):
            pad = [(1, 0)] * (BOX_RANK - len(levels))
            rows.append([len(rows), 0, rng.choice([READ, WRITE, UPDATE]), at, run, *(c for c, _ in (*levels, *pad)),
                         *(s for _, s in (*levels, *pad))])  # fmt: skip
    return from_rows(np.array(rows, np.int64))


@pytest.mark.parametrize("layouts", [[(64, 16, 8)], [(64, 16), (32, 8), ()], [(60, 7), (33, 10), (5,)], [()]])
@pytest.mark.parametrize("seed", range(8))
def test_overlap_is_exact(layouts, seed):
    rng = np.random.default_rng(seed)
    a, b = random_boxes(rng, 25, layouts), random_boxes(rng, 30, layouts)
    sa, sb = [box_bytes(a, r) for r in range(25)], [box_bytes(b, r) for r in range(30)]
    want = {(i, j) for i in range(25) for j in range(30) if sa[i] & sb[j]}
    assert set(zip(*(x.tolist() for x in overlaps(a, b)), strict=True)) == want
    clash = {(i, j) for i, j in want if a.mode[i] != READ or b.mode[j] != READ}
    assert set(zip(*(x.tolist() for x in conflicts(a, b)), strict=True)) == clash
    assert 0 < len(clash) < len(want) < 25 * 30


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_tiles_of_one_array_seen_through_two_shapes(m, t, h, cols, width, u):
    """Columns of [m, n] against heads of [m, h, d]: the digit path, whole rows included."""
    n = h * width
    a = expand((m, n), (t, min(cols, n)), (Touch(0, WRITE, 4, 0, ((0, n * 4, 0, m), (1, 4, 0, n))),))
    b = expand((h, m), (1, u), (Touch(0, READ, 4, 0, ((1, n * 4, 0, m), (0, width * 4, 0, h), (-1, 4, 0, width))),))
    got = set(zip(*(x.tolist() for x in overlaps(a, b)), strict=True))
    want = {(i, j) for i in range(len(a)) for j in range(len(b)) if box_bytes(a, i) & box_bytes(b, j)}
    assert got == want


def test_a_pair_with_too_many_pieces_is_compared_by_hull(monkeypatch):
    a = from_rows(np.array([[0, 0, WRITE, 0, 2, 5, 1, 1, 1, 10, 0, 0, 0]], np.int64))
    b = from_rows(np.array([[0, 0, WRITE, 4, 2, 4, 1, 1, 1, 10, 0, 0, 0]], np.int64))
    c = from_rows(np.array([[0, 0, WRITE, 2, 2, 3, 1, 1, 1, 15, 0, 0, 0]], np.int64))
    assert not len(overlaps(a, b)[0])
    assert not (box_bytes(a, 0) & box_bytes(b, 0)) and box_bytes(a, 0) & box_bytes(c, 0) == set()
    assert not len(overlaps(a, c)[0])
    monkeypatch.setattr(boxes, "PIECES", 1)
    assert len(overlaps(a, c)[0]) == 1, "conservative"


def test_ragged_tiles():
    b = expand((10,), (4,), (Touch(3, WRITE, 2, 6, ((0, 2, 0, 10),)),))
    assert b.task.tolist() == [0, 1, 2]
    assert b.offset.tolist() == [6, 14, 22] and b.run.tolist() == [8, 8, 4]
    assert b.buffer.tolist() == [3, 3, 3]


def test_a_range_restricts_the_tiles_that_reach_it():
    b = expand((10,), (4,), (Touch(0, READ, 1, 0, ((0, 1, 5, 7),)),))
    assert (b.task.tolist(), b.offset.tolist(), b.run.tolist()) == ([1], [5], [2])
