"""Loops and branches that XLA runs, around bodies that are functions of their own.

A call of a megakernel costs as much as a few dozen small equations, so what a scan repeats is several of its iterations. Of
a loop whose length nobody knows it is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc
from jax import lax

from jax_mpk import _compat
from jax_mpk.frontend.control import equations

TOGETHER = 4_000
"""Equations of the iterations of a scan that are one body, at most. None of more than an eighth are put together."""
STACKED = 1 << 16
"""Bytes of what is stacked that an iteration may read: a loop around a kernel copies layers of weights before every call."""
Body = Callable[[jc.ClosedJaxpr, Sequence[Any]], Sequence[Any]]
"""Runs a body on operands: gives its results."""


class Control:
    """An equation that is a loop or branches. bodies: what it repeats, or the branches; what decides whether a loop goes on is
    not among them."""

    def __init__(self, eqn: Any):
        self.eqn, p = eqn, eqn.params
        self.bodies: tuple[jc.ClosedJaxpr, ...]
        if eqn.primitive.name == "while":
            self.bodies = (p["body_jaxpr"],)
        elif eqn.primitive.name == "cond":
            self.bodies = tuple(p["branches"])
        else:
            self.each = n = together(eqn)
            rest = p["length"] % n
            self.bodies = (p["jaxpr"],) if n == 1 else tuple(_iterations(p, k) for k in (n, rest) if k)

    def run(self, operands: Sequence[Any], body: Body) -> list[Any]:
        """The results, every body run by `body`."""
        return {"while": self._while, "scan": self._scan, "cond": self._cond}[self.eqn.primitive.name](
            list(operands), body
        )

    def _while(self, xs: list[Any], body: Body) -> list[Any]:
        p = self.eqn.params
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        asked, fixed, carry = xs[:first], xs[first:second], xs[second:]
        goes_on = jc.jaxpr_as_fun(p["cond_jaxpr"])
        step = lambda c: list(body(self.bodies[0], (*fixed, *c)))
        return list(lax.while_loop(lambda c: goes_on(*asked, *c)[0], step, carry))

    def _cond(self, xs: list[Any], body: Body) -> list[Any]:
        which, *rest = xs
        cases = [lambda *ys, j=j: list(body(j, ys)) for j in self.bodies]
        return list(lax.switch(which.astype("int32") if isinstance(which, jax.Array) else int(which), cases, *rest))

    def _scan(self, xs: list[Any], body: Body) -> list[Any]:
        """Rows in runs of `each`; those that are left over come last, wherever they are."""
        p, n = self.eqn.params, self.each
        consts, carries = _compat.scan_counts(p)
        fixed, carry, rows = xs[:consts], xs[consts : consts + carries], xs[consts + carries :]
        length, back = p["length"], p["reverse"]
        runs, rest = divmod(length, n)
        cut = rest if back else length - rest

        def step(carry: list[Any], run: list[Any]) -> tuple[list[Any], list[Any]]:
            out = list(body(self.bodies[0], (*fixed, *carry, *run)))
            return out[:carries], out[carries:]

        def split(x: Any) -> tuple[Any, Any]:
            return (x[cut:], x[:cut]) if back else (x[:cut], x[cut:])

        if n == 1:
            carry, made = lax.scan(step, carry, rows, length=length, reverse=back)
            return [*carry, *made]
        main = [split(x)[0].reshape(runs, n, *x.shape[1:]) for x in rows]
        carry, made = lax.scan(step, carry, main, length=runs, reverse=back)
        made = [y.reshape(runs * n, *y.shape[2:]) for y in made]
        if rest:
            out = list(body(self.bodies[1], (*fixed, *carry, *(split(x)[1] for x in rows))))
            carry, last = out[:carries], out[carries:]
            made = [lax.concatenate([y, z] if back else [z, y], 0) for z, y in zip(made, last, strict=True)]
        return [*carry, *made]


def has_bodies(eqn: Any) -> bool:
    """Whether an equation is a loop or branches."""
    return eqn.primitive.name in ("while", "scan", "cond")


def stacks(scan: Any) -> bool:
    """Whether iterations of a scan read much of what is stacked."""
    rows = _compat.open_jaxpr(scan.params["jaxpr"])[0].invars[sum(_compat.scan_counts(scan.params)) :]
    return bool(sum(math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 8) for v in rows) > STACKED)


def together(eqn: Any) -> int:
    """How many iterations of a scan are one body: of small ones many, such that none is left over if that is possible. One, if
    all of them would be (there is another reason than its length that XLA has the loop), or devices meet in it."""
    length, once = eqn.params["length"], eqn.params["jaxpr"]
    work = equations(once)
    if stacks(eqn) or 8 * work > TOGETHER or length * work <= TOGETHER or once.effects:
        return 1
    most: int = TOGETHER // work
    return next((n for n in range(most, most // 2, -1) if length % n == 0), most)


def _iterations(p: Any, n: int) -> jc.ClosedJaxpr:
    """So many iterations as a function of the constants, what is carried, and so many rows."""
    consts, carries = _compat.scan_counts(p)
    at, once = consts + carries, p["jaxpr"]
    each: Callable[..., list[Any]] = jc.jaxpr_as_fun(once)

    def run(*xs: Any) -> list[Any]:
        fixed, carry, rows = xs[:consts], list(xs[consts:at]), list(xs[at:])

        def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            out = each(*fixed, *carry, *row)
            return out[:carries], out[carries:]

        last, made = lax.scan(step, carry, rows, length=n, reverse=p["reverse"])
        return [*last, *made]

    types = [v.aval for v in _compat.open_jaxpr(once)[0].invars]
    return jax.make_jaxpr(run)(*types[:at], *(t.update(shape=(n, *t.shape)) for t in types[at:]))
