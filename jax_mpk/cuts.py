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
from jax_mpk.errors import plural
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
    """The pieces of a function, in order; `whole`: the function without calls."""

    whole: jc.ClosedJaxpr
    pieces: tuple[Piece, ...]

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
    results = set(_variables(open_.outvars))
    free: set[int] = set()  # these depend on constants only, and are repeated rather than handed over
    for n, e in enumerate(eqns):
        mixed = any(v in given for v in _variables(e.invars)) or any(v in results for v in e.outvars)
        if n not in refused and not mixed and all(m in free for m in needs[n]):
            free.add(n)
    mine = [n for n in range(len(eqns)) if n not in free and n not in refused]
    if not mine:
        return None
    level = _levels(needs, set(refused), free)
    pieces: list[Piece] = []
    wanted = results  # by what comes after a piece
    for x in range(max(level), -1, -1):
        for kernel, among in ((False, sorted(refused)), (True, mine)):
            if group := [n for n in among if level[n] == x]:
                made = [v for n in group for v in eqns[n].outvars if v in wanted]
                inside = [eqns[n] for n in sorted({*group, *_below(group, needs, free)})]
                pieces.append(_piece(whole, kernel, inside, made))
                wanted = wanted | set(pieces[-1].inputs)
    return Cuts(whole, tuple(reversed(pieces)))


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
    """The free equations that others need, directly or not."""
    out: set[int] = set()
    todo = [m for n in roots for m in needs[n] if m in free]
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
