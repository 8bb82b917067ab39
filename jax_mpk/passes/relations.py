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
        self._ids: dict[tuple[object, ...], int] = {}
        self._memo: dict[tuple[object, ...], int] = {}

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


class Reach:
    """The closure of dependencies between grids, on demand. Grids are pushed in program order."""

    def __init__(self, rel: Relations) -> None:
        self._rel = rel
        self._edges: list[dict[int, int]] = []
        self._above: list[int] = []  # per grid, the bit set of grids from which a path leads here
        self._rows: list[dict[int, int]] = []  # rows[a][c]: closure of the dependencies of grid c on grid a

    def push(self, edges: dict[int, int]) -> None:
        """The next grid; `edges`: grid (earlier, or itself) -> relation."""
        here = len(self._edges)
        own = self._rel.plus(edges.get(here, EMPTY))
        above = 0
        for a in edges:
            above |= self._above[a] | 1 << a if a != here else 0
        self._edges.append(edges)
        self._above.append(above)
        self._rows.append({} if own == EMPTY else {here: own})

    def closure(self, a: int, c: int) -> int:
        """The dependencies of grid c on grid a, direct and indirect."""
        row, rel = self._rows[a], self._rel
        if c not in row and a < c:
            for d in [*(a + 1 + n for n in _bits(self._above[c] >> a + 1)), c]:
                if d not in row and self._above[d] >> a & 1:
                    out = rel.union(self._edges[d].get(a, EMPTY), self.indirect(a, d, self._edges[d]))
                    row[d] = rel.union(out, rel.product(self._rows[d].get(d, EMPTY), out))
        return row.get(c, EMPTY)

    def indirect(self, a: int, b: int, edges: dict[int, int]) -> int:
        """What grid b with `edges` depends on in grid a by a path through the grids before b, a itself included."""
        rel = self._rel
        out = rel.product(edges.get(a, EMPTY), self._rows[a].get(a, EMPTY))
        for c in sorted(edges, reverse=True):
            if rel.full(out) or c <= a:
                break
            if c < b and self._above[c] >> a & 1:
                out = rel.union(out, rel.product(edges[c], self.closure(a, c)))
        return out


def _bits(x: int) -> list[int]:
    """The positions of the set bits, ascending."""
    out = []
    while x:
        low = x & -x
        out.append(low.bit_length() - 1)
        x ^= low
    return out


def _product(z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The boolean matrix product, over distinct rows and columns only: large grids repeat them."""
    rows, row = _distinct(z)
    cols, col = _distinct(x.T)
    out: np.ndarray = ((z[rows].astype(np.float32) @ x[:, cols].astype(np.float32)) > 0)[np.ix_(row, col)]
    return out


def _distinct(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the distinct rows, and for every row which one it is."""
    if m.size < 4096:
        return np.arange(len(m)), np.arange(len(m))
    packed = np.ascontiguousarray(np.packbits(m, axis=1))
    _, first, which = np.unique(packed.view(f"V{packed.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    return first, which.reshape(-1)
