"""Boolean relations between the tasks of two grids, interned, with memoised products.

A relation is a matrix [tasks of the later grid, tasks of the earlier grid]. Identical layers give identical matrices,
so a whole model needs the products of one layer. Relations are named by small integers; `EMPTY` is the empty one.
"""

from __future__ import annotations

import numpy as np

EMPTY = -1


class Relations:
    """A table of relations."""

    def __init__(self) -> None:
        self._table: list[np.ndarray] = []
        self._full: list[bool] = []
        self._ids: dict[tuple, int] = {}
        self._memo: dict[tuple, int] = {}

    def __getitem__(self, r: int) -> np.ndarray:
        return self._table[r]

    def full(self, r: int) -> bool:
        """Whether every pair is related."""
        return r != EMPTY and self._full[r]

    def add(self, m: np.ndarray) -> int:
        """The name of matrix `m`."""
        if not m.any():
            return EMPTY
        key = (m.shape, np.packbits(m).tobytes())
        if key not in self._ids:
            self._ids[key] = len(self._table)
            self._table.append(m)
            self._full.append(bool(m.all()))
        return self._ids[key]

    def union(self, a: int, b: int) -> int:
        """Pairs in a or b."""
        if a == b or b == EMPTY or self.full(a):
            return a
        if a == EMPTY or self.full(b):
            return b
        key = ("or", min(a, b), max(a, b))
        if key not in self._memo:
            self._memo[key] = self.add(self._table[a] | self._table[b])
        return self._memo[key]

    def minus(self, a: int, b: int) -> int:
        """Pairs in a and not in b."""
        if EMPTY in (a, b) or self.full(b):
            return a if b == EMPTY else EMPTY
        key = ("minus", a, b)
        if key not in self._memo:
            self._memo[key] = self.add(self._table[a] & ~self._table[b])
        return self._memo[key]

    def product(self, later: int, earlier: int) -> int:
        """Pairs (z, x) with some y such that (z, y) is in `later` and (y, x) in `earlier`."""
        if EMPTY in (later, earlier):
            return EMPTY
        key = ("of", later, earlier)
        if key not in self._memo:
            self._memo[key] = self.add(_product(self._table[later], self._table[earlier]))
        return self._memo[key]

    def plus(self, r: int) -> int:
        """The transitive closure of a relation of a grid with itself."""
        while True:
            more = self.union(r, self.product(r, r))
            if more == r:
                return r
            r = more


def _product(z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The boolean matrix product, over distinct rows and columns only: large grids repeat them."""
    rows, row = _distinct(z)
    cols, col = _distinct(x.T)
    return ((z[rows].astype(np.float32) @ x[:, cols].astype(np.float32)) > 0)[np.ix_(row, col)]


def _distinct(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the distinct rows, and for every row which one it is."""
    if m.size < 4096:
        return np.arange(len(m)), np.arange(len(m))
    packed = np.ascontiguousarray(np.packbits(m, axis=1))
    _, first, which = np.unique(packed.view(f"V{packed.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    return first, which.reshape(-1)
