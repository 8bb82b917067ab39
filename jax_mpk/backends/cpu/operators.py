"""Operators as the CPU executor runs them: the bytecode of every nest of a body, parameters, flags.

Operators of equal structure (`Bound.key`) are encoded once: the layers of a model differ only in what their slots bind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jax_mpk import abi
from jax_mpk.backends.cpu import code
from jax_mpk.backends.cpu.registers import Code, RegisterPressure
from jax_mpk.ir.body import Body
from jax_mpk.kinds import kind_of
from jax_mpk.kinds.bound import Bound


@dataclass
class Compiled:
    """An operator without its bindings: records of codes by role, parameters by name, flags."""

    kind: str
    codes: dict[str, list[Code]] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    flags: int = 0


def compile(b: Bound, body: Body) -> Compiled:
    """The codes and parameters of an operator; raises `RegisterPressure`."""
    out = Compiled(body.kind, params=dict(body.params), flags=abi.IN_PLACE if body.in_place else 0)
    single = frozenset(b.roles("batch"))  # a core takes one batch point after the other
    for role, nests in body.nests.items():
        out.codes[role] = [code.compile(x, b.number, single) for x in nests]
    return out


def pressure(b: Bound) -> str:
    """Why the registers of the executor do not hold what an operator computes; "" if they do."""
    try:
        compile(b, kind_of(b.op).body(b, b.op))
    except RegisterPressure as e:
        return str(e)
    return ""
