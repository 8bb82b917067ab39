"""From a refined graph and its task graph to a program (`jax_mpk.abi`)."""

from __future__ import annotations

from jax_mpk.emit.check import check
from jax_mpk.emit.program import emit

__all__ = ["check", "disassemble", "emit"]


def disassemble(program: bytes) -> str:
    """A readable listing of a program."""
    from jax_mpk import abi
    from jax_mpk.inspect.dump import listing

    return listing(abi.decode(program))
