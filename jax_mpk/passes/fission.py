"""Pass `fission`: a contraction whose columns have separate readers becomes one contraction for each of them.

Q, K and V in one matrix, gate and up in one matrix: `x @ w` is sliced, and each slice goes its own way. As one operator its
columns would be cut without regard to the slices, and what combines two of them (an activation times the other half)
could not be an epilogue. As contractions over slices of the weight, which are views and cost nothing, they are
what a model with separate matrices has, so both spellings give one program. Columns that nobody reads are not computed.
"""

from __future__ import annotations

from dataclasses import replace

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr, Load
from jax_mpk.ir.graph import Contract, Graph, Op, Value
from jax_mpk.passes.reindex import replace_nodes

PARTS = 8
"""Most slices of one contraction: beyond it (a slice a head) operators are too small to be worth their tasks."""
COLUMNS = 32
"""Fewest columns of a slice."""
Segment = tuple[int, int]


Spans = dict[Load, list[Segment]]
"""Loads of one value, with the interval that each reads along every dimension."""


def run(g: Graph) -> Graph:
    """The graph with such contractions taken apart, along one dimension of their result each."""
    reads = _reads(g)
    whole = set(g.results) | {v for op in g.ops for pair in op.inplace() for v in pair}
    values = dict(g.values)
    table: dict[Expr, Expr] = {}  # load of a value that was taken apart -> load of its part
    ops: list[Op] = []
    for op in g.ops:
        op = op.with_exprs({r: replace_nodes(e, table) for r, e in op.exprs().items()}) if table else op
        spans = reads.get(op.out)
        cut = _cut(op, spans) if isinstance(op, Contract) and spans and op.out not in whole else None
        if cut is None:
            ops.append(op)
            continue
        dim, segments = cut
        try:
            parts = [_part(values, op, dim, segment) for segment in segments]  # type: ignore[arg-type]
        except E.NotAffine:  # the columns of an operand are repeated, and the slice does not begin with one of them
            ops.append(op)
            continue
        ops += parts
        for part, (lo, hi) in zip(parts, segments, strict=True):
            for x, span in spans.items():  # type: ignore[union-attr]
                if lo <= span[dim][0] and span[dim][1] <= hi:
                    shifted = E.coord_add(x.coords[dim], E.coord_const(-lo))
                    table[x] = E.load(part.out, (*x.coords[:dim], shifted, *x.coords[dim + 1 :]), x.dtype)
    return g.with_ops(ops, values) if table else g


def _reads(g: Graph) -> dict[int, Spans]:
    """Every load of every value."""
    out: dict[int, Spans] = {}
    for op in g.ops:
        for e in op.exprs().values():
            for x, ranges in E.walk_loads(e):
                shape = g.values[x.value].shape
                spans = [(0, n) for n in shape]
                for d, c in enumerate(x.coords):
                    if c.dyn is None and E.UNKNOWN not in ranges:
                        lo, hi = E.coord_range(c, ranges)
                        spans[d] = max(lo, 0), min(hi + 1, shape[d])
                known = out.setdefault(x.value, {}).get(x)
                if known is not None:  # one node in several places
                    spans = [(min(a, p), max(b, q)) for (a, b), (p, q) in zip(known, spans, strict=True)]
                out[x.value][x] = spans
    return out


def _cut(op: Contract, spans: Spans) -> tuple[int, list[Segment]] | None:
    """The dimension of the columns along which the readers are apart, and the segments that they read."""
    if op.store is not None or any(c.dyn is not None for x in spans for c in x.coords):
        return None
    for dim in op.axes("n"):
        segments: list[Segment] = []
        for lo, hi in sorted(s[dim] for s in spans.values()):
            if segments and lo < segments[-1][1]:
                segments[-1] = segments[-1][0], max(hi, segments[-1][1])
            else:
                segments.append((lo, hi))
        rest = 1
        for a in op.axes("n"):
            rest *= op.domain[a] if a != dim else 1
        small = any((hi - lo) * rest < COLUMNS for lo, hi in segments)
        if segments != [(0, op.domain[dim])] and len(segments) <= PARTS and not small:
            return dim, segments
    return None


def _part(values: dict[int, Value], op: Contract, dim: int, segment: Segment) -> Contract:
    """The contraction over one segment of dimension `dim`, as a value of its own."""
    lo, hi = segment
    shape = tuple(hi - lo if d == dim else n for d, n in enumerate(op.domain))
    out, v = max(values) + 1, values[op.out]
    values[out] = Value(out, shape, v.dtype, name=v.name and f"{v.name}.{lo}")
    at = {dim: E.coord_add(E.coord_axis(dim, hi - lo), E.coord_const(lo))}
    exprs = {role: E.substitute_axes(e, at) for role, e in op.exprs().items()}
    return replace(op, out=out, domain=shape).with_exprs(exprs)
