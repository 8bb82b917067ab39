"""Contractions: a prologue on the left operand, weights as they lie in memory, an epilogue on the sums."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_mpk import abi
from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.ir.graph import Contract, Graph
from jax_mpk.ir.loops import loop_axes
from jax_mpk.kinds.contract import cuda
from jax_mpk.kinds.contract.even import widths
from jax_mpk.kinds.kind import Case, TaskKind, cut, normal

if TYPE_CHECKING:
    from jax_mpk.kinds.bound import Bound

MIN_MACS = 1 << 14
"""Multiply-adds of the smallest task worth its synchronisation."""
ROWS = (16, 64)
"""Rows of a block when the rows are cut: at least, at most."""
ACCUMULATORS = 1 << 18
"""Accumulators (f32 scratch) that a task may need."""
SHARED_ACCUMULATORS = 1 << 11
"""The same where they take shared memory from the ring of the weight stream."""


def tile(graph: Graph, op: Contract, target: Device) -> dict[int, int]:
    """Columns in multiples of `target.columns`; rows only when there are many; whole matrices of a batch."""
    axes = loop_axes(op)
    role = {r: [x for x in axes if x.role == r] for r in ("batch", "m", "n", "k")}
    batch, m, n, k = (math.prod(x.extent for x in role[r]) for r in ("batch", "m", "n", "k"))
    wanted = min(target.tasks, max(1, batch * m * n * k * len(op.rhs) // MIN_MACS))
    workers, times = wanted, 1
    tile: dict[int, int] = {}
    if role["m"]:
        across = batch * max(1, n // target.columns)
        rows = m
        if m > ROWS[1] or (m > ROWS[0] and across < wanted):
            rows = min(ROWS[1], max(ROWS[0], math.ceil(m * across / wanted)))
        left = m
        for x in role["m"]:  # single steps of the outer axes, then the one that is cut, so that rows are one range
            left //= max(1, x.extent)
            tile[x.axis] = min(x.extent, max(1, rows // max(1, left)))
            times *= max(1, math.ceil(x.extent / tile[x.axis]))
            if tile[x.axis] > 1 or left <= rows:
                break
        m = math.prod(tile.get(x.axis, x.extent) for x in role["m"])
    for axis, t in cut(role["batch"], math.ceil(wanted / times)).items():
        tile[axis] = t
        times *= math.ceil(op.domain[axis] / t)
    if role["n"]:
        x = role["n"][0]
        inner = max(1, n // max(1, x.extent))
        limit = SHARED_ACCUMULATORS if target.gpu else ACCUMULATORS
        most = max(target.columns, limit // max(1, m * len(op.rhs)) // target.columns * target.columns)
        beside = _beside(graph, op, target)
        together = tuple(math.prod(x.extent for x in loop_axes(o) if x.role == "n") for o in beside)
        all_widths = widths(together, times, workers, target.columns, most)
        columns = all_widths[[o.out for o in beside].index(op.out)]
        step = target.columns // math.gcd(inner, target.columns)
        step = step if step * inner <= max(columns, 2 * target.columns) else 1
        tile[x.axis] = max(1, min(x.extent, math.ceil(max(1, columns // inner) / step) * step))
    return tile


def _beside(graph: Graph, op: Contract, target: Device) -> list[Contract]:
    """The contractions of the same left operand, which are dealt together on a device that deals levels: `op` is one."""
    if not target.gpu:
        return [op]
    return [x for x in graph.ops if isinstance(x, Contract) and x.lhs is op.lhs and x.k == op.k
            and len(x.rhs) == len(op.rhs) and _rows(x) == _rows(op)]  # fmt: skip


def _rows(op: Contract) -> list[tuple[str, int]]:
    return [(x.role, x.extent) for x in loop_axes(op) if x.role in ("batch", "m")]


def body(c: Bound, op: Contract) -> Body:
    out = Body("CONTRACT")
    dtype = "f32" if op.lhs.dtype == "f32" else "i32"
    for j, rhs in enumerate(op.rhs):
        c.core(out, f"RHS{j}", rhs)
    out.params |= {"N_RHS": len(op.rhs), "REDUCE_DTYPE": abi.enum("Dtype", dtype.upper())}
    c.counts(out, N_BATCH="batch", N_M="m", N_N="n", N_K="k")
    act = c.scratch(abi.SLOT_ACT, dtype, "m", "k")
    out.nests["LHS"] = c.nests(op.lhs, c.roles("batch", "m", "k"), act)
    acc = {j: c.scratch(abi.SLOT_ACC + j, dtype, "m", "n") for j in range(len(op.rhs))}
    out.nests["EPILOGUE"] = c.nests(op.epilogue, range(len(op.domain)), c.result(), acc)
    return out


def work(op: Contract) -> tuple[int, int]:
    points, k = math.prod(op.domain), math.prod(n for _, n in op.k)
    left = math.prod(op.domain[a] for a in (*op.axes("batch"), *op.axes("m"))) * k
    return 2 * points * k * len(op.rhs), int(op.lhs.cost * left + op.epilogue.cost * points)


def _norm(x: jax.Array, w: jax.Array) -> jax.Array:
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)) @ w


CASES = (
    Case("matrix", lambda x, w: x @ w, lambda r: (normal(r, 7, 130), normal(r, 130, 75))),
    Case("transposed", lambda x, w: x @ w.T, lambda r: (normal(r, 3, 96), normal(r, 200, 96))),
    Case("bf16", lambda x, w: x @ w,
         lambda r: (normal(r, 2, 256, dtype=jnp.bfloat16), normal(r, 256, 320, dtype=jnp.bfloat16))),
    Case("norm", _norm, lambda r: (normal(r, 4, 200), normal(r, 200, 64))),
    Case("gated", lambda x, g, u: jax.nn.silu(x @ g) * (x @ u),
         lambda r: (normal(r, 3, 64), normal(r, 64, 90), normal(r, 64, 90))),
    Case("residual", lambda x, w: x + x @ w, lambda r: (normal(r, 5, 48), normal(r, 48, 48))),
    Case("batched", lambda x, y: jnp.einsum("bij,bkj->kbi", x, y),
         lambda r: (normal(r, 3, 5, 17), normal(r, 3, 9, 17))),
    Case("integers", lambda x, w: x @ w,
         lambda r: (r.integers(-(1 << 31), 1 << 31, (3, 40)).astype("int32"),
                    r.integers(-(1 << 31), 1 << 31, (40, 30)).astype("int32"))),
    Case("small integers", lambda x, w: jax.lax.dot(x, w.T, preferred_element_type=jnp.int32),
         lambda r: (r.integers(-128, 128, (7, 75)).astype("int8"), r.integers(-128, 128, (90, 75)).astype("int8"))),
    Case("many rows", lambda x, w: x @ w, lambda r: (normal(r, 150, 64), normal(r, 64, 100))),
)  # fmt: skip

CONTRACT = TaskKind(
    "contract", (Contract,), tile, body, work, cuda.variant, cuda.source, CASES, ("kinds/contract.cuh",)
)
