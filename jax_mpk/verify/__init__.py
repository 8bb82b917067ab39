"""The proof that a compiled program computes what it should, before it is ever launched.

It takes the blob that will be launched (`program`, `codes`: what the bodies load and store, read off their codes), shares
no code with the passes that made it, and assumes nothing about the workers except that each runs its tasks in record
order; what orders two tasks is events alone. In order: `structure`, `streams`, `events` (thresholds, deadlock), `memory`
(races, values, coverage).
"""

from __future__ import annotations

from dataclasses import dataclass

from jax_mpk import abi
from jax_mpk.device import Device
from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.verify import events, memory, streams, structure
from jax_mpk.verify.program import task_graph


@dataclass(frozen=True)
class Certificate:
    """What was proven. `pairs`: groups of conflicting accesses whose order was checked; `covered`: bytes that are
    written exactly once; `workspace`: bytes that the program needs besides operands and results."""

    tasks: int
    events: int
    pairs: int
    covered: int
    workspace: int

    def __str__(self) -> str:
        return (f"verified: {self.tasks} tasks and {self.events} events, no deadlock; {self.pairs} conflicting accesses "
                f"in order; {self.covered} bytes written once; workspace {self.workspace} bytes")  # fmt: skip


def verify(program: bytes | TaskGraph, *, target: Device | None = None) -> Certificate:
    """Prove a program sound (a blob, or a complete task graph), or raise `VerifyError` naming tasks and bytes."""
    try:
        tg = task_graph(abi.decode(program)) if isinstance(program, bytes) else program
    except (abi.ProgramError, IndexError) as e:  # an index that points nowhere
        raise VerifyError(f"not a program: {e}") from None
    shape = structure.check(tg)
    streams.check(tg, target)
    before = events.check(tg)
    pairs, covered = memory.check(tg, shape, before)
    return Certificate(tg.tasks, tg.events, pairs, covered, tg.workspace)


__all__ = ["Certificate", "verify"]
