"""Results that are another view of a core's output are written by the core itself.

A decoder returns `logits[:, 0]` of a contraction's `[B, 1, V]` and takes their argmax: without this step the squeeze
would be a copy of all logits. The core stores through the view, and other readers load the result.
"""

from __future__ import annotations

from dataclasses import replace

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Load
from jax_mpk.ir.graph import Graph, Map, Op, compute_dtype, itemsize
from jax_mpk.ir.loops import identity
from jax_mpk.passes.axes import inverse


def run(g: Graph) -> Graph:
    """The graph with such results renamed into their producers."""
    cores = {op.out: op for op in g.ops if "epilogue" in op.exprs()}
    overwritten = {old for op in g.ops for old, _ in op.inplace()}  # what is updated in place keeps its own buffer
    moved: dict[int, tuple[int, tuple[Coord, ...]]] = {}  # value -> (result, its coordinates over the value's axes)
    for op in g.ops:
        if isinstance(op, Map) and op.out in g.results and op.store is None and isinstance(op.expr, Load):
            v, out = g.values[op.expr.value], g.values[op.out]
            if (
                v.id not in cores
                or v.id in moved
                or v.id in g.results
                or v.id in overwritten
                or not _holds(out.dtype, v.dtype)
            ):
                continue
            back = inverse(op.expr.coords, op.domain, v.shape)
            if back is not None and _composes(g, v.id, back):
                moved[v.id] = op.out, back
    if not moved:
        return g
    taken = {result for result, _ in moved.values()}
    return g.with_ops([_rewrite(op, moved) for op in g.ops if op.out not in taken])


def _holds(wide: str, narrow: str) -> bool:
    """Every value of `narrow` is one of `wide`, in the same arithmetic (f32 holds bf16)."""
    return wide == narrow or (compute_dtype(wide) == compute_dtype(narrow) and itemsize(wide) > itemsize(narrow))


def _composes(g: Graph, value: int, back: tuple[Coord, ...]) -> bool:
    """Whether everybody who reads `value` can read it through `back` (one who reads backwards has no digits of a place)."""
    loads = {x for op in g.ops for e in op.exprs().values() if value in e.loads for x in E.walk(e)
             if isinstance(x, Load) and x.value == value}  # fmt: skip
    try:
        for x in loads:
            _compose(back, x.coords)
    except E.NotAffine:
        return False
    return True


def _rewrite(op: Op, moved: dict[int, tuple[int, tuple[Coord, ...]]]) -> Op:
    def through(x: Load) -> Load | None:
        if x.value not in moved:
            return None
        result, back = moved[x.value]
        return E.load(result, _compose(back, x.coords), x.dtype)

    exprs = {r: E.substitute_loads(e, through) for r, e in op.exprs().items() if e.loads & moved.keys()}
    op = op.with_exprs(exprs) if exprs else op
    if op.out in moved:
        result, back = moved[op.out]
        op = replace(op, out=result, store=_compose(back, identity(op)))
    return op


def _compose(outer: tuple[Coord, ...], inner: tuple[Coord, ...]) -> tuple[Coord, ...]:
    point = dict(enumerate(inner))
    return tuple(E.coord_substitute(c, point, lambda e: e) for c in outer)
