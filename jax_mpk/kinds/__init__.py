"""The registry of task kinds. Adding one: a folder here, `cuda/kinds/x.cuh`, and a body in `ffi/cpu/isa/`."""

from __future__ import annotations

from jax_mpk.ir.graph import Op
from jax_mpk.kinds.attention import ATTENTION
from jax_mpk.kinds.contract import CONTRACT
from jax_mpk.kinds.kind import Case, TaskKind
from jax_mpk.kinds.rows import ROWS
from jax_mpk.kinds.scan import SCAN
from jax_mpk.kinds.sort import SORT

KINDS: tuple[TaskKind, ...] = (ROWS, CONTRACT, ATTENTION, SORT, SCAN)
_OF = {cls: kind for kind in KINDS for cls in kind.ops}


def kind_of(op: Op) -> TaskKind:
    """The kind that runs an operator."""
    return _OF[type(op)]


__all__ = ["KINDS", "Case", "TaskKind", "kind_of"]
