"""Pass `inplace`: every in-place write is made legal, by order where possible and by a copy where not.

A value that is overwritten in place must have no reader afterwards, must not be a constant or a result, and an
argument may be overwritten only if its last version is a result (which the caller then finds in the argument's
buffer). Readers of the old version that come later in the program are moved before the overwrite when nothing that
they depend on needs the new version. Otherwise the operator overwrites a copy.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import replace

from jax_mpk.ir import expr as E
from jax_mpk.ir.graph import Attention, Graph, Map, Op, Update, compute_dtype


def run(g: Graph) -> Graph:
    """`g` with operators reordered and copies inserted so that no value is read after it was overwritten."""
    if not any(op.inplace() for op in g.ops):
        return g
    plan = _Plan(g)
    copies = plan.decide()
    return _rewrite(g, plan.order(), copies)


class _Plan:
    """Operators by position, their dependencies, and the constraints that in-place writes add."""

    def __init__(self, g: Graph):
        self.g = g
        self.producer = {v: n for n, op in enumerate(g.ops) for v in op.writes()}
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.after: list[set[int]] = [set() for _ in g.ops]
        """Operators that must come after an operator."""
        for n, op in enumerate(g.ops):
            for v in op.reads():
                self.readers[v].append(n)
                if v in self.producer and self.producer[v] != n:
                    self.after[self.producer[v]].add(n)
        self.constrained = False

    def decide(self) -> set[tuple[int, int]]:
        """The (position, value) pairs whose operator must overwrite a copy; everything else is made legal by order.

        Backwards: the last of several operators that overwrite one value does it in place, the others read before.
        """
        g, copies = self.g, set()
        last: dict[int, int] = {}  # value -> the version at the end of its chain of in-place writes
        results = set(g.results)
        for n in reversed(range(len(g.ops))):
            for old, new in g.ops[n].inplace():
                role = g.values[old].role
                final = last.get(new, new)
                owned = role == "temp" or (role == "arg" and final in results)
                legal = owned and old not in results and self._alone(n, old)
                if legal and self._order_readers(n, old):
                    last[old] = final
                else:
                    copies.add((n, old))
        return copies

    def _alone(self, n: int, old: int) -> bool:
        """Whether the operator itself reads the old version only as its target."""
        op = self.g.ops[n]
        plain = frozenset().union(*(e.loads for e in op.exprs().values()))
        return old not in plain and sum(o == old for o, _ in op.inplace()) == 1

    def _order_readers(self, n: int, old: int) -> bool:
        """Puts every other reader of `old` before `n`, if the dependencies allow it for all of them."""
        late = [r for r in self.readers[old] if r > n]
        if late:
            below = self._reachable(n)
            if not below.isdisjoint(late):
                return False
            self.constrained = True
        for r in self.readers[old]:
            if r != n:
                self.after[r].add(n)
        return True

    def _reachable(self, n: int) -> set[int]:
        seen, stack = {n}, [n]
        while stack:
            for m in self.after[stack.pop()]:
                if m not in seen:
                    seen.add(m)
                    stack.append(m)
        return seen - {n}

    def order(self) -> list[int]:
        """The program order where it is legal: each operator as early as the constraints let the program order be."""
        count = len(self.g.ops)
        if not self.constrained:
            return list(range(count))
        waits = [0] * count
        for later in self.after:
            for m in later:
                waits[m] += 1
        ready = [n for n in range(count) if not waits[n]]
        heapq.heapify(ready)
        out = []
        while ready:
            n = heapq.heappop(ready)
            out.append(n)
            for m in self.after[n]:
                waits[m] -= 1
                if not waits[m]:
                    heapq.heappush(ready, m)
        assert len(out) == count, "in-place constraints form a cycle"
        return out


def _rewrite(g: Graph, order: list[int], copies: set[tuple[int, int]]) -> Graph:
    values = dict(g.values)
    ops: list[Op] = []
    fresh = max(values, default=-1) + 1
    for n in order:
        op = g.ops[n]
        for old, _ in op.inplace():
            if (n, old) in copies:
                v = values[old]
                values[fresh] = replace(v, id=fresh, role="temp", index=-1, data=None, name="")
                coords = tuple(E.coord_axis(a, k) for a, k in enumerate(v.shape))
                e = E.load(old, coords, compute_dtype(v.dtype))
                ops.append(Map(fresh, v.shape, op.source, None, expr=e))
                op = _retarget(op, old, fresh)
                fresh += 1
        ops.append(op)
    return g.with_ops(ops, values)


def _retarget(op: Op, old: int, new: int) -> Op:
    """The operator with its (first) in-place target `old` replaced."""
    if isinstance(op, Update):
        return replace(op, append=replace(op.append, target=new))
    assert isinstance(op, Attention)
    done, appends = False, []
    for a in op.appends:
        hit = a.target == old and not done
        done |= hit
        appends.append(replace(a, target=new) if hit else a)
    return replace(op, appends=tuple(appends))
