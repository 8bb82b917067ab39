"""Calls, branches and loops of known length: all are written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_mpk import _compat
from jax_mpk.frontend.arithmetic import choose
from jax_mpk.frontend.builder import DEAD, Builder, Equation, Tensor, as_i32
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import pick, stacked
from jax_mpk.ir import expr as E

UNROLL_LIMIT = 20_000
"""A scan is written out up to this many equations (its length times those of its body, nested ones included)."""


@primitive(*sorted(_compat.CALLS), empty=True)
def _call(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    jaxpr = _compat.called(eqn)
    if jaxpr is None:
        b.unsupported("a call without a jaxpr")
    b.unplaced()
    return b.inline(jaxpr, xs, eqn.live, _lines(eqn, jaxpr))


def _lines(eqn: Equation, jaxpr: Any) -> str:
    """The line that the equations inside a call stand for: that of the call if the callee is a library function."""
    return eqn.inherited or (eqn.source.where if _compat.is_library(jaxpr) else "")


@primitive("cond", empty=True)
def _cond(b: Builder, eqn: Equation, which: Tensor, *xs: Tensor) -> Sequence[Tensor]:
    """Every branch is computed and one result selected: branches have no side effects. A known branch is the only one."""
    branches = eqn.params["branches"]
    if isinstance(which.splat, E.Const):
        branches = branches[min(max(int(which.splat.value), 0), len(branches) - 1) :][:1]
    results = [b.inline(j, xs, eqn.live, eqn.inherited) for j in branches]
    if len(branches) == 1:
        return results[0]
    out = []
    for n, (on, (shape, dtype)) in enumerate(zip(eqn.live, eqn.outs, strict=True)):
        cases = [r[n] for r in results]
        if on and any(c is not cases[0] for c in cases):
            w = which.over(())
            w = w if w.dtype == "bool" else as_i32(w)
            out.append(b.map(shape, dtype, choose(w, [c.over(shape) for c in cases])))
        else:
            out.append(cases[0])
    return out


@primitive("platform_index")
def _platform_index(b: Builder, eqn: Equation) -> Tensor:
    """Which of the platforms' branches is for the one that the program is made for; the branch without one is any's."""
    platforms = eqn.params["platforms"]
    for n, names in enumerate(platforms):
        if names is not None and b.platform in names:
            return b.map((), "i32", E.const(n, "i32"))
    if None not in platforms:
        b.unsupported(f"no branch for the platform {b.platform}")
    return b.map((), "i32", E.const(platforms.index(None), "i32"))


@primitive("scan", empty=True)
def _scan(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    """Unrolled; slices of the inputs are index maps, the stacked outputs one concatenation."""
    p = eqn.params
    length, (n_consts, n_carry) = p["length"], _compat.scan_counts(p)
    jaxpr = p["jaxpr"]
    work = length * equations(jaxpr)
    if work > UNROLL_LIMIT:
        b.unsupported(f"{length} iterations of {work // length} equations are more than the {UNROLL_LIMIT} that are "
                      "written out: the loop is XLA's, a kernel does what it repeats")  # fmt: skip
    consts, carry, rows = xs[:n_consts], list(xs[n_consts : n_consts + n_carry]), xs[n_consts + n_carry :]
    live_rows = eqn.live[n_carry:]
    order = range(length - 1, -1, -1) if p["reverse"] else range(length)
    columns: list[list[Tensor]] = [[] for _ in live_rows]
    for step, n in enumerate(order):
        carried = (True,) * n_carry if step < length - 1 else eqn.live[:n_carry]
        slices = [pick(b, x, 0, n) for x in rows]
        results = b.inline(jaxpr, (*consts, *carry, *slices), (*carried, *live_rows), eqn.inherited)
        carry = results[:n_carry]
        for column, t in zip(columns, results[n_carry:], strict=True):
            column.append(t)
    columns = [c[::-1] for c in columns] if p["reverse"] else columns
    if not length:
        return [*carry, *(b.map(shape, dtype, DEAD.at(())) for shape, dtype in eqn.outs[n_carry:])]
    return [*carry, *(stacked(b, c, 0) if on else DEAD for c, on in zip(columns, live_rows, strict=True))]


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr, those of calls and loops inside included."""
    total = 0
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        inner = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))
                 if hasattr(_compat.open_jaxpr(v)[0], "eqns")]  # fmt: skip
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(equations, inner)) if inner else 1
    return total


@primitive("while")
def _while(b: Builder, eqn: Equation, *_: Tensor) -> Sequence[Tensor]:
    b.unsupported("a loop whose length is not known when it is traced is XLA's, a kernel does what it repeats")
