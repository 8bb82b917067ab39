"""A function cut around what megakernels do not do: as few megakernels as can be, and what XLA runs between them.

The equations of the function without calls (`trace.flat`) that `frontend.gaps` names are XLA's. Every other one belongs to a
megakernel, numbered by how many of XLA's it has to wait for, one after the other; then each moves to the last one that
whoever needs it allows, so that there are few. What depends on constants only is repeated wherever it is needed, or rules
that ask for a constant would not find it.

Of a loop or branch that is XLA's, the bodies are functions again: megakernels, cut if need be (`control`). Where nobody named
an implementation, an equation that XLA does much faster is cut out as well (`slow`, see `predict.faster_apart`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jc
import numpy as np

from jax_mpk import _compat, control
from jax_mpk.errors import Gap, plural
from jax_mpk.frontend import gaps
from jax_mpk.trace import flat


@dataclass(frozen=True)
class Piece:
    """Some equations as a function: of the values of `inputs`, it gives those of `outputs` (variables of the whole).

    kind: "megakernel" | "xla" | "control" (XLA's as well: one equation, whose bodies are megakernels: `control`)."""

    kind: str
    jaxpr: jc.ClosedJaxpr
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    flow: control.Control | None = None

    @property
    def kernels(self) -> tuple[jc.ClosedJaxpr, ...]:
        """The functions that are megakernels."""
        if self.flow:
            return self.flow.bodies
        return (self.jaxpr,) if self.kind == "megakernel" else ()

    def run(
        self, operands: Sequence[Any], megakernel: Callable[[jc.ClosedJaxpr, Sequence[Any]], Sequence[Any]]
    ) -> Sequence[Any]:
        """The values of `outputs`."""
        if self.kind == "megakernel":
            return megakernel(self.jaxpr, operands)
        if not self.flow:
            out: list[Any] = jc.jaxpr_as_fun(self.jaxpr)(*operands)
            return out
        eqn = self.flow.eqn
        env = dict(zip(self.inputs, operands, strict=True))
        xs = [np.asarray(v.val, v.aval.dtype) if _compat.is_literal(v) else env[v] for v in eqn.invars]
        made = dict(zip(eqn.outvars, self.flow.run(xs, megakernel), strict=True))
        return [made[v] for v in self.outputs]


@dataclass(frozen=True)
class Cuts:
    """The pieces of a function, in order. whole: the function without calls. gaps: why equations were refused. slow: numbers of
    the equations that XLA does faster."""

    whole: jc.ClosedJaxpr
    pieces: tuple[Piece, ...]
    gaps: tuple[Gap, ...] = ()
    slow: tuple[int, ...] = ()

    @property
    def kernels(self) -> tuple[jc.ClosedJaxpr, ...]:
        """The functions that are megakernels, numbered as they come."""
        return tuple(k for p in self.pieces for k in p.kernels)

    def run(
        self, args: Sequence[Any], megakernel: Callable[[int, jc.ClosedJaxpr, Sequence[Any]], Sequence[Any]]
    ) -> list[Any]:
        """The results. `megakernel(n, jaxpr, operands)` runs number n of `kernels`."""
        open_ = self.whole.jaxpr
        env = dict(zip((*open_.constvars, *open_.invars), (*self.whole.consts, *args), strict=True))
        number = {id(k): n for n, k in enumerate(self.kernels)}
        numbered = lambda jaxpr, xs: megakernel(number[id(jaxpr)], jaxpr, xs)
        for p in self.pieces:
            env.update(zip(p.outputs, p.run([env[v] for v in p.inputs], numbered), strict=True))
        return [v.val if _compat.is_literal(v) else env[v] for v in open_.outvars]

    def __str__(self) -> str:
        faster = ", which is faster" if self.slow and not self.gaps else ""
        lines = [f"cut into {plural(len(self.kernels), 'megakernel')}; XLA runs the rest{faster}"]
        count = 0
        for p in self.pieces:
            if p.kind != "megakernel":
                names = dict.fromkeys(e.primitive.name for e in p.jaxpr.jaxpr.eqns)
                lines.append(f"  XLA: {', '.join(names)}{', around' if p.kernels else ''}")
            for k in p.kernels:
                indent = "  " if p.kind == "megakernel" else "    "
                open_ = k.jaxpr
                counts = ((len(open_.eqns), "equation"), (len(open_.invars), "operand"), (len(open_.outvars), "result"))
                lines.append(f"{indent}megakernel {count}: {', '.join(plural(*c) for c in counts)}")
                count += 1
        return "\n".join(lines)


Slow = Callable[[Any, Callable[[], jc.ClosedJaxpr]], bool]
"""Whether XLA should have an equation, which as a function is what the second argument gives."""


def cut(closed: jc.ClosedJaxpr, platform: str, slow: Slow | None = None) -> Cuts | None:
    """The pieces of a function; None where no equation is refused or slow, or nothing is left for a megakernel, or an equation places
    values on parts of a mesh: a megakernel beside it would gather them."""
    whole = flat(closed)
    why = gaps(whole, platform=platform)
    eqns, open_ = whole.jaxpr.eqns, whole.jaxpr
    if any(_compat.places(eqns[n]) for n in why):
        return None
    maker = {v: n for n, e in enumerate(eqns) for v in e.outvars}
    needs = [[maker[v] for v in _variables(e.invars) if v in maker] for e in eqns]
    given = {*open_.invars, *open_.constvars}
    results = set(_variables(open_.outvars))
    free: set[int] = set()  # these depend on constants only, and are repeated rather than handed over
    for n, e in enumerate(eqns):
        mixed = any(v in given for v in _variables(e.invars)) or any(v in results for v in e.outvars)
        if n not in why and not mixed and all(m in free for m in needs[n]):
            free.add(n)

    def alone(n: int) -> jc.ClosedJaxpr:
        inside = [eqns[m] for m in sorted({n, *_below([n], needs, free)})]
        return _piece(whole, "xla", inside, [v for v in eqns[n].outvars if not _compat.is_dropped(v)]).jaxpr

    asked = (n for n in range(len(eqns)) if n not in why and n not in free) if slow else ()
    late = [n for n in asked if slow and slow(eqns[n], functools.partial(alone, n))]
    refused = {*why, *late}
    mine = [n for n in range(len(eqns)) if n not in free and n not in refused]
    if not refused or not mine and not any(control.has_bodies(eqns[n]) for n in refused):
        return None
    level = _levels(needs, refused, free)
    pieces: list[Piece] = []
    wanted = results  # by what comes after a piece
    for x in range(max(level), -1, -1):
        theirs = [n for n in sorted(refused) if level[n] == x]
        for kind, group in (*_runs(theirs, eqns), ("megakernel", [n for n in mine if level[n] == x])):
            below = sorted(_below(group, needs, free))
            steps = [(kind, sorted((*group, *below)))] if kind != "control" else [(kind, group), ("xla", below)]
            for how, inside in steps:
                if made := [v for n in inside for v in eqns[n].outvars if v in wanted]:
                    pieces.append(_piece(whole, how, [eqns[n] for n in inside], made))
                    wanted = wanted | set(pieces[-1].inputs)
    return Cuts(whole, tuple(reversed(pieces)), tuple(g for n in why for g in why[n]), tuple(late))


def _runs(numbers: Sequence[int], eqns: Sequence[Any]) -> list[tuple[str, list[int]]]:
    """Equations of XLA, last first: each with bodies alone, the others as long as they follow each other."""
    out: list[tuple[str, list[int]]] = []
    for n in numbers:
        kind = "control" if control.has_bodies(eqns[n]) else "xla"
        if out and out[-1][0] == kind == "xla":
            out[-1][1].append(n)
        else:
            out.append((kind, [n]))
    return out[::-1]


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


def _piece(whole: jc.ClosedJaxpr, kind: str, eqns: list[Any], made: list[Any]) -> Piece:
    inside = {v for e in eqns for v in e.outvars}
    inputs = tuple(dict.fromkeys(v for e in eqns for v in _variables(e.invars) if v not in inside))
    open_ = whole.jaxpr
    names = dict(zip(open_.invars, _compat.argument_names(open_), strict=True))
    info = _compat.renamed(open_.debug_info, [names.get(v, "") for v in inputs], [""] * len(made))
    effects = frozenset().union(*(e.effects for e in eqns))
    jaxpr = open_.replace(constvars=[], invars=list(inputs), outvars=made, eqns=eqns, effects=effects, debug_info=info)
    inner = control.Control(eqns[0]) if kind == "control" else None
    return Piece(kind, jc.ClosedJaxpr(jaxpr, []), inputs, tuple(made), inner)
