"""Loops and branches that XLA runs, around bodies that are functions of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc
from jax import lax

from jax_mpk import _compat

Body = Callable[[jc.ClosedJaxpr, Sequence[Any]], Sequence[Any]]
"""Runs a body on operands: gives its results."""


def bodies(eqn: Any) -> tuple[jc.ClosedJaxpr, ...]:
    """What a loop repeats, or the branches; empty for any other equation. What decides whether a loop goes on is not among them."""
    name, p = eqn.primitive.name, eqn.params
    if name == "while":
        return (p["body_jaxpr"],)
    if name == "scan":
        return (p["jaxpr"],)
    return tuple(p["branches"]) if name == "cond" else ()


def run(eqn: Any, operands: Sequence[Any], body: Body) -> list[Any]:
    """The results of a loop or branch, every body of which is run by `body`."""
    return {"while": _while, "scan": _scan, "cond": _cond}[eqn.primitive.name](eqn, list(operands), body)


def _while(eqn: Any, xs: list[Any], body: Body) -> list[Any]:
    p = eqn.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    asked, fixed, carry = xs[:first], xs[first:second], xs[second:]
    goes_on = jc.jaxpr_as_fun(p["cond_jaxpr"])
    out = lax.while_loop(lambda c: goes_on(*asked, *c)[0], lambda c: list(body(p["body_jaxpr"], (*fixed, *c))), carry)
    return list(out)


def _scan(eqn: Any, xs: list[Any], body: Body) -> list[Any]:
    p = eqn.params
    consts, carries = _compat.scan_counts(p)
    fixed, carry, rows = xs[:consts], xs[consts : consts + carries], xs[consts + carries :]

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        out = list(body(p["jaxpr"], (*fixed, *carry, *row)))
        return out[:carries], out[carries:]

    last, stacked = lax.scan(step, carry, rows, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*last, *stacked]


def _cond(eqn: Any, xs: list[Any], body: Body) -> list[Any]:
    which, *rest = xs
    cases = [lambda *ys, j=j: list(body(j, ys)) for j in eqn.params["branches"]]
    return list(lax.switch(which.astype("int32") if isinstance(which, jax.Array) else int(which), cases, *rest))
