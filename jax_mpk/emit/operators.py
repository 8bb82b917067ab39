"""Operators as the CPU executor runs them: the bytecode of every nest of a body, core accesses, parameters, flags.

Operators of equal structure (`Bound.key`) are encoded once: the layers of a model differ only in what their slots bind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jax_mpk import abi
from jax_mpk.emit import code
from jax_mpk.emit.registers import Code, access
from jax_mpk.kinds import kind_of
from jax_mpk.kinds.bound import Bound


@dataclass
class Compiled:
    """An operator without its bindings: records of codes by role, of core accesses, parameters by name, flags."""

    kind: str
    codes: dict[str, list[Code]] = field(default_factory=dict)
    accesses: list[bytes] = field(default_factory=list)
    params: dict[str, int] = field(default_factory=dict)
    flags: int = 0


def compile(b: Bound) -> Compiled:
    """The codes and parameters of an operator; raises `RegisterPressure`."""
    body = kind_of(b.op).body(b, b.op)
    out = Compiled(body.kind, params=dict(body.params), flags=abi.IN_PLACE if body.in_place else 0)
    for role, nests in body.nests.items():
        out.codes[role] = [code.compile(x, b.number) for x in nests]
    for name, place in body.cores.items():
        out.params[name] = len(out.accesses)
        out.accesses.append(access(place, b.number))
    return out
