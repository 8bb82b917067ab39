"""What a thread keeps in registers between the stages of a nest with reductions, so that memory is waited for once.

A nest often reads at the end what a reduction has read (the row that is normalised), and always waits for the reduction
before it reads anything else (the weights of the norm), because loads do not move over a barrier. `carried` finds the
first, `early` the second.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jax_mpk.backends.cuda.expressions import Printer
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Acc, Expr, Load, Reduce
from jax_mpk.ir.opcodes import alias
from jax_mpk.ir.pieces import boxes

CARRY = 8
"""Most points for which a thread keeps a value of a reduction."""
CARRIED = 2
"""Most values of reductions that it keeps."""
EARLY = 4
"""Most values that a thread keeps from before the reductions: more would not stay in registers beside those."""


@dataclass(frozen=True)
class Carried:
    """`here`, which the end of the nest needs at every point, is `there` in the body of `reduce`, at the same points by
    the same thread."""

    reduce: Reduce
    there: Expr
    here: Expr


def carried(p: Printer, roots: Sequence[Expr], local: Collection[Expr], inner: Sequence[tuple[int, int]],
            turns: int) -> list[Carried]:  # fmt: skip
    """Values of reductions that the end of the nest would compute again. `local`: the nodes that differ from point to
    point; `inner`: axis id and extent of its loops, whole ones; `turns`: points of a thread."""
    if not inner or turns > CARRY:
        return []
    seen: dict[Expr, tuple[Reduce, Expr]] = {}
    for r in p.order(roots):
        if isinstance(r, Reduce) and r.extents == tuple(n for _, n in inner):
            (_, body), *more = boxes(r.body, {a: (0, n) for a, n in zip(r.bound, r.extents, strict=True)})
            if more:
                continue
            to = {a: E.coord_axis(x, n) for a, (x, n) in zip(r.bound, inner, strict=True)}
            memo: dict[Expr, Expr] = {}
            memo[body] = E.substitute_axes(body, to, memo)
            for there, here in memo.items():
                seen.setdefault(alias(here), (r, alias(there)))
    known = {x for x in p.order(roots) if x in seen and x in local}
    need = {x: None for x in roots if x in known}
    for y in p.order(roots, known):
        need |= {x: None for x in p.args(y) if x in known} if not isinstance(y, Reduce) else {}
    return [Carried(*seen[x], x) for x in need] if len(need) <= CARRIED else []


def early(
    p: Printer, roots: Sequence[Expr], local: Collection[Expr], turns: int, given: Collection[Expr]
) -> list[Expr]:
    """The nodes of the end of the nest that are known before any reduction, and lead to memory: what is kept of them.
    `local`: the nodes that differ from point to point; `given` come from the reductions."""
    late: dict[Expr, bool] = {}  # whether a reduction is below
    loads: dict[Expr, bool] = {}  # whether memory is
    keep: dict[Expr, None] = {}
    nodes = [x for x in p.order(roots, given) if x not in given]
    for x in nodes:
        args = [a for a in p.args(x)] if not isinstance(x, Reduce) else []
        late[x] = isinstance(x, Reduce) or any(late.get(a, a in given) for a in args)
        loads[x] = isinstance(x, Load | Acc) or any(loads.get(a, False) for a in args)
    for x in nodes:
        if late[x] and not isinstance(x, Reduce):
            keep |= {a: None for a in p.args(x) if a in local and not late.get(a, True) and loads[a]}
    keep |= {r: None for r in roots if r in local and not late.get(r, True) and loads[r]}
    return list(keep) if len(keep) * turns <= EARLY else []
