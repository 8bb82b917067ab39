"""Sorted rows: sort, argsort and top-k."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_mpk import abi
from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.ir.graph import Graph, Sort
from jax_mpk.ir.loops import loop_axes
from jax_mpk.kinds.kind import Case, TaskKind, cut, normal
from jax_mpk.kinds.rows import MIN_COST
from jax_mpk.kinds.sort import cuda

if TYPE_CHECKING:
    from jax_mpk.kinds.bound import Bound


def tile(graph: Graph, op: Sort, target: Device) -> dict[int, int]:
    """Whole rows. The threads of a GPU's worker wait for each other at every step of a row, however short it is."""
    row, least = len(op.domain) - 1, max(1, MIN_COST // 16) if target.gpu else MIN_COST
    return cut(loop_axes(op), min(target.tasks, work(op)[1] // least), frozenset((row,)))


def body(c: Bound, op: Sort) -> Body:
    out = Body("SORT")
    dtype = "i32" if op.key.dtype == "bool" else op.key.dtype
    out.nests["MAIN"] = c.nests(op.key, range(len(op.domain)), c.row_scratch(abi.SLOT_ACC, dtype, len(op.domain) - 1))
    c.core_place(out, "OUT", c.result())
    out.params |= {"KEY_DTYPE": abi.enum("Dtype", dtype.upper()), "COUNT": op.count,
                   "DESCENDING": int(op.descending), "PAYLOAD": int(op.payload == "indices")}  # fmt: skip
    return out


def core(op: Sort) -> int:
    return int(math.prod(op.domain) * math.log2(max(2, op.domain[-1])))


def work(op: Sort) -> tuple[int, int]:
    return 0, int(math.prod(op.domain) * (op.key.cost + math.ceil(math.log2(max(2, op.domain[-1])))))


CASES = (
    Case("sort", lambda x: jnp.sort(x, -1), lambda r: (normal(r, 5, 77),)),
    Case("argsort", lambda x: jnp.argsort(x, -1), lambda r: (r.integers(0, 9, (4, 50)).astype("int32"),)),
    Case("top k", lambda x: jax.lax.top_k(x, 6), lambda r: (normal(r, 3, 100),)),
)

SORT = TaskKind("sort", (Sort,), tile, body, work, cuda.variant, cuda.source, CASES, ("kinds/sort.cuh",), core)
