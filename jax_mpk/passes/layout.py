"""Pass `layout`: the dimension order of values that only the program sees follows how they are read.

jaxprs fix the dimension order of every intermediate (a batched contraction puts its batch dimensions first); its
reader may walk it in another order. A temporary is free to be stored in the reader's order, which makes the reader's
index map contiguous instead of a transpose.
"""

from __future__ import annotations

from dataclasses import replace

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Load
from jax_mpk.ir.graph import Contract, Graph, Op
from jax_mpk.ir.loops import identity


def run(g: Graph) -> Graph:
    """The graph with the dimensions of temporaries permuted; results and values updated in place keep theirs."""
    fixed = set(g.results) | {v for op in g.ops for pair in op.inplace() for v in pair}
    reader: dict[int, Load] = {}
    for op in g.ops:
        for role, e in op.exprs().items():
            for x in E.walk(e):
                if isinstance(x, Load) and x.value not in fixed and g.values[x.value].role == "temp":
                    if x.value not in reader or (isinstance(op, Contract) and role == "lhs"):
                        reader[x.value] = x
    order = {v: p for v, x in reader.items() if (p := _order(x)) is not None}
    if not order:
        return g
    values = dict(g.values)
    for v, p in order.items():
        values[v] = replace(values[v], shape=tuple(values[v].shape[d] for d in p))
    return g.with_ops([_rewrite(op, order) for op in g.ops], values)


def _order(x: Load) -> tuple[int, ...] | None:
    """Dimensions from the slowest to the fastest as the load walks them, or None if they are in that order."""

    def speed(d: int) -> tuple[int, int, int]:
        terms = x.coords[d].terms
        if not terms:
            return -1, 0, d
        fastest = max(terms, key=lambda t: (t.axis, -t.div))
        return fastest.axis, -fastest.div, d

    order = tuple(sorted(range(len(x.coords)), key=speed))
    moved = [d for d in order if x.coords[d] != Coord()]
    return order if moved != sorted(moved) else None


def _rewrite(op: Op, order: dict[int, tuple[int, ...]]) -> Op:
    def permuted(x: Load) -> Load | None:
        p = order.get(x.value)
        return E.load(x.value, tuple(x.coords[d] for d in p), x.dtype) if p else None

    exprs = {r: E.substitute_loads(e, permuted) for r, e in op.exprs().items() if e.loads & order.keys()}
    op = op.with_exprs(exprs) if exprs else op
    p = order.get(op.out)
    return replace(op, store=tuple(identity(op)[d] for d in p)) if p else op
