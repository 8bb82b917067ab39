"""Pass `simplify`: index maps leave the graph, equal operators become one, expressions take their simplest form.

Afterwards no operator is a mere reshape, transpose, slice, broadcast, concatenate or cast (unless it is a result),
no two operators compute the same thing, and everything computed serves a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from jax_mpk.ir import algebra
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr
from jax_mpk.ir.graph import Contract, Graph, Map, Op, Source, compute_dtype
from jax_mpk.passes.substitute import inline, settle


def run(g: Graph) -> Graph:
    """Views inlined, algebra applied, common subexpressions shared, dead operators dropped."""
    views: dict[int, Expr] = {}  # value -> the index map that it is, or a load of the equal value computed before
    seen: dict[tuple[object, ...], int] = {}
    gone: set[int] = set()
    ops: list[Op] = []
    for op in g.ops:
        op = settle(op.with_exprs({r: algebra.simplify(e) for r, e in op.exprs().items()}))
        op = _degenerate(inline(op, views, gone))
        ops.append(op)
        gone.update(old for old, _ in op.inplace())
        if op.store is None and not op.inplace():
            v = g.values[op.out]
            twin = seen.setdefault((replace(op, out=-1, source=Source()), v.dtype), op.out)
            if twin != op.out:
                coords = tuple(E.coord_axis(a, n) for a, n in enumerate(v.shape))
                views[op.out] = E.load(twin, coords, compute_dtype(v.dtype))
            elif isinstance(op, Map) and algebra.is_view(op.expr):
                views[op.out] = op.expr
    return dead(g.with_ops(ops))


def _degenerate(op: Op) -> Op:
    """A contraction over at most one element is a product (an outer product, RoPE's position times frequency)."""
    if not isinstance(op, Contract) or math.prod(n for _, n in op.k) != 1:
        return op
    zero = {a: E.coord_const(0) for a, _ in op.k}
    lhs = E.substitute_axes(op.lhs, zero)
    products = [E.binary("mul", lhs, E.substitute_axes(r, zero)) for r in op.rhs]
    return Map(op.out, op.domain, op.source, op.store, replace_acc(op.epilogue, products))


def replace_acc(e: Expr, values: Sequence[Expr]) -> Expr:
    """`e` with accumulator j replaced by `values[j]`."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        hit = memo.get(x)
        if hit is None:
            memo[x] = hit = values[x.index] if isinstance(x, E.Acc) else E.rebuild(x, go, lambda c: c)
        return hit

    return go(e)


def dead(g: Graph) -> Graph:
    """Without the operators whose values nobody needs."""
    live, kept = set(g.results), []
    for op in reversed(g.ops):
        if live & set(op.writes()):
            live |= op.reads()
            kept.append(op)
    return g.with_ops(kept[::-1])
