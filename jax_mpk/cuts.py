"""A function cut around what megakernels do not do: as few megakernels as can be, and what XLA runs between them.

The equations of the function without calls (`trace.flat`) that `frontend.gaps` names are XLA's. Every other one belongs to a
megakernel, numbered by how many of XLA's it has to wait for, one after the other; then each moves to the last one that
whoever needs it allows, so that there are few. What depends on constants only is repeated wherever it is needed, or rules
that ask for a constant would not find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jc

from jax_mpk import _compat
from jax_mpk.errors import Gap, plural
from jax_mpk.frontend import gaps
from jax_mpk.trace import flat


@dataclass(frozen=True)
class Piece:
    """Some equations as a function: of the values of `inputs`, it gives those of `outputs` (variables of the whole)."""

    megakernel: bool
    jaxpr: jc.ClosedJaxpr
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Cuts:
    """The pieces of a function, in order, and what was cut out; `whole`: the function without calls."""

    whole: jc.ClosedJaxpr
    pieces: tuple[Piece, ...]
    gaps: tuple[Gap, ...]

    @property
    def megakernels(self) -> int:
        return sum(p.megakernel for p in self.pieces)

    def run(self, args: Sequence[Any], megakernel: Callable[[int, Piece, list[Any]], Sequence[Any]]) -> list[Any]:
        """The results. `megakernel(n, piece, operands)` runs megakernel number n."""
        open_ = self.whole.jaxpr
        env = dict(zip((*open_.constvars, *open_.invars), (*self.whole.consts, *args), strict=True))
        count = 0
        for p in self.pieces:
            operands = [env[v] for v in p.inputs]
            out = megakernel(count, p, operands) if p.megakernel else jc.jaxpr_as_fun(p.jaxpr)(*operands)
            count += p.megakernel
            env.update(zip(p.outputs, out, strict=True))
        return [v.val if _compat.is_literal(v) else env[v] for v in open_.outvars]

    def __str__(self) -> str:
        lines = [f"cut into {plural(self.megakernels, 'megakernel')}; XLA runs the rest"]
        count = 0
        for p in self.pieces:
            eqns = p.jaxpr.jaxpr.eqns
            if p.megakernel:
                parts = (
                    plural(len(eqns), "equation"),
                    plural(len(p.inputs), "operand"),
                    plural(len(p.outputs), "result"),
                )
                lines.append(f"  megakernel {count}: {', '.join(parts)}")
                count += 1
            else:
                names = dict.fromkeys(e.primitive.name for e in eqns)
                lines.append(f"  XLA: {', '.join(names)}")
        return "\n".join(lines)


def cut(closed: jc.ClosedJaxpr, platform: str) -> Cuts | None:
    """The pieces of a function; None where no equation is refused, or nothing is left that is not, or one places values on
    parts of a mesh: a megakernel beside it would gather them."""
    whole = flat(closed)
    refused = gaps(whole, platform=platform)
    eqns, open_ = whole.jaxpr.eqns, whole.jaxpr
    if not refused or any(_compat.places(eqns[n]) for n in refused):
        return None
    maker = {v: n for n, e in enumerate(eqns) for v in e.outvars}
    needs = [[maker[v] for v in _variables(e.invars) if v in maker] for e in eqns]
    given = {*open_.invars, *open_.constvars}
    free: set[int] = set()
    for n, e in enumerate(eqns):
        if n not in refused and not any(v in given for v in _variables(e.invars)) and all(m in free for m in needs[n]):
            free.add(n)
    level = _levels(needs, set(refused), free)
    mine = [n for n in range(len(eqns)) if n not in free and n not in refused]
    if not mine:
        return None
    results = list(dict.fromkeys(_variables(open_.outvars)))
    groups = [[n for n in among if level[n] == x] for x in range(max(level) + 1) for among in (mine, sorted(refused))]
    last = max(x for x, g in enumerate(groups) if g)
    late = [maker[v] for v in results if v in maker and maker[v] in free]  # results that depend on constants only
    pieces = []
    for x, group in enumerate(groups):
        if group:
            inside = sorted({*group, *_below([*group, *(late if x == last else ())], needs, free)})
            pieces.append((x % 2 == 0, inside))
    wanted = [set(results)]  # by what comes after a piece
    for _, inside in reversed(pieces):
        wanted.append(wanted[-1] | {v for n in inside for v in _variables(eqns[n].invars)})
    wanted.reverse()
    done: set[Any] = set()
    out = []
    for (kernel, inside), after in zip(pieces, wanted[1:], strict=True):
        made = [
            v for n in inside for v in eqns[n].outvars if v in after and v not in done and _needed(v, n, free, results)
        ]
        done.update(made)
        out.append(_piece(whole, kernel, [eqns[n] for n in inside], made))
    return Cuts(whole, tuple(out), tuple(g for n in sorted(refused) for g in refused[n]))


def _needed(v: Any, n: int, free: set[int], results: Sequence[Any]) -> bool:
    """What is free is repeated, never handed over, unless it is a result."""
    return n not in free or v in results


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not _compat.is_literal(v)]


def _levels(needs: list[list[int]], refused: set[int], free: set[int]) -> list[int]:
    """The number of the megakernel of every equation, or after which one XLA runs it."""
    level = [0] * len(needs)
    users: list[list[int]] = [[] for _ in needs]
    for n, makers in enumerate(needs):
        for m in makers:
            users[m].append(n)
            if m not in free and n not in free:
                level[n] = max(level[n], level[m] + (m in refused and n not in refused))
    top = max((x for n, x in enumerate(level) if n not in refused and n not in free), default=0)
    for n in range(len(needs) - 1, -1, -1):
        if n not in refused and n not in free:
            level[n] = max(level[n], min((level[u] for u in users[n] if u not in free), default=top))
    return level


def _below(roots: Sequence[int], needs: list[list[int]], free: set[int]) -> set[int]:
    """The free equations that others need, directly or not; roots that are free are among them."""
    out: set[int] = set()
    todo = [m for n in roots for m in ([n] if n in free else needs[n]) if m in free]
    while todo:
        n = todo.pop()
        if n not in out:
            out.add(n)
            todo += needs[n]
    return out


def _piece(whole: jc.ClosedJaxpr, kernel: bool, eqns: list[Any], made: list[Any]) -> Piece:
    inside = {v for e in eqns for v in e.outvars}
    inputs = tuple(dict.fromkeys(v for e in eqns for v in _variables(e.invars) if v not in inside))
    open_ = whole.jaxpr
    names = dict(zip(open_.invars, _compat.argument_names(open_), strict=True))
    info = _compat.renamed(open_.debug_info, [names.get(v, "") for v in inputs], [""] * len(made))
    effects = frozenset().union(*(e.effects for e in eqns))
    jaxpr = open_.replace(constvars=[], invars=list(inputs), outvars=made, eqns=eqns, effects=effects, debug_info=info)
    return Piece(kernel, jc.ClosedJaxpr(jaxpr, []), inputs, tuple(made))
