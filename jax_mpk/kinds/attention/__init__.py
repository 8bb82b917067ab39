"""Softmax attention over a cache, with the cache appends and everything around it fused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mpk import abi
from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Body
from jax_mpk.ir.graph import HEAD_AXIS, Attention, Graph
from jax_mpk.ir.loops import loop_axes
from jax_mpk.kinds.attention import cuda
from jax_mpk.kinds.kind import Case, TaskKind, normal

if TYPE_CHECKING:
    from jax_mpk.kinds.bound import Bound

ROWS = 64
"""Rows of a task when the rows are cut."""
SOFTMAX = 8
"""Scalar work of the softmax per score."""


def tile(graph: Graph, op: Attention, target: Device) -> dict[int, int]:
    """One task a batch point; its rows are cut into ranges of the flattened row index when nothing is appended."""
    axes = loop_axes(op)
    tile = {x.axis: 1 for x in axes if x.role == "batch"}
    rows = [x for x in axes if x.role == "rows"]
    inner = math.prod(x.extent for x in rows)
    for x in rows if not op.appends else ():
        if inner <= ROWS:
            break
        inner //= max(1, x.extent)
        tile[x.axis] = max(1, min(x.extent, ROWS // max(1, inner)))
    return tile


def body(c: Bound, op: Attention) -> Body:
    out = Body("ATTENTION")
    c.core(out, "KEY", op.k)
    c.core(out, "VALUE", op.v)
    c.counts(out, N_BATCH="batch", N_ROWS="rows")
    for j, a in enumerate(op.appends):
        out.nests[f"APPEND{j}"] = c.append(a)
    points, rows = c.roles("batch"), c.roles("rows")
    out.nests["Q"] = c.nests(op.q, [*points, *rows, HEAD_AXIS], c.scratch(abi.SLOT_ACT, "f32", "rows", "head"))
    if op.limit is not None:
        out.nests["LIMIT"] = c.nests(op.limit, points, c.scratch(abi.SLOT_LIMIT, "i32"))
    acc = c.scratch(abi.SLOT_ACC, "f32", "rows", "key")
    for role, e in (("SCORE", op.score), ("PROB", op.prob)):
        if not isinstance(e, E.Acc):
            out.nests[role] = c.nests(e, [*points, *rows, *c.roles("key")], acc, {0: acc})
    acc = c.scratch(abi.SLOT_ACC + 1, "f32", "rows", "column")
    out.nests["EPILOGUE"] = c.nests(op.epilogue, [*points, *rows, op.column], c.result(), {0: acc})
    return out


def core(op: Attention) -> int:
    return SOFTMAX * op.keys * math.prod(op.domain[a] for a in (*op.batch, *op.rows))


def work(op: Attention) -> tuple[int, int]:
    rows = math.prod(op.domain[a] for a in (*op.batch, *op.rows))
    scalar = rows * (op.q.cost * op.head + (op.score.cost + op.prob.cost + SOFTMAX) * op.keys)
    scalar += math.prod(op.domain) * op.epilogue.cost + sum(math.prod(a.window) * a.expr.cost for a in op.appends)
    return 2 * rows * op.keys * (op.head + op.domain[op.column]), int(scalar)


def _masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    s = jnp.where(mask, jnp.einsum("hqd,hkd->hqk", q, k) / 3.0, -1e30)
    return jnp.einsum("hqk,hkd->qhd", jax.nn.softmax(s, -1), v)


def _cached(q: jax.Array, new: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array) -> tuple[jax.Array, ...]:
    """Grouped queries [B, G, N, D] over caches [B, S, G, D], one new row a step."""
    k = jax.lax.dynamic_update_slice(k, new, (0, pos, 0, 0))
    v = jax.lax.dynamic_update_slice(v, jnp.tanh(new), (0, pos, 0, 0))
    s = jnp.einsum("bgnd,bsgd->bgns", q, k, preferred_element_type=jnp.float32) * 0.3
    p = jax.nn.softmax(jnp.where(jnp.arange(k.shape[1]) <= pos, s, -1e30), -1).astype(v.dtype)
    return jnp.einsum("bgns,bsgd->bgnd", p, v), k, v


def _cache(r: np.random.Generator, dtype: type) -> tuple[Any, ...]:
    q, new, k, v = (normal(r, *s, dtype=dtype) for s in ((2, 3, 2, 16), (2, 1, 3, 16), (2, 20, 3, 16), (2, 20, 3, 16)))
    return q, new, k, v, jnp.int32(11)


CASES = (
    Case("random mask", _masked, lambda r: (normal(r, 3, 7, 9), normal(r, 3, 13, 9), normal(r, 3, 13, 11),
                                            (r.random((1, 7, 13)) < 0.7) | (np.arange(13) == 0))),
    Case("cache", _cached, lambda r: _cache(r, np.float32)),
    Case("cache bf16", _cached, lambda r: _cache(r, jnp.bfloat16)),
    Case("many rows", _masked, lambda r: (normal(r, 2, 80, 8), normal(r, 2, 33, 8), normal(r, 2, 33, 8),
                                          np.tri(80, 33, dtype=bool)[None])),
)  # fmt: skip

FILES = ("kinds/attention.cuh", "kinds/flash.cuh")
ATTENTION = TaskKind("attention", (Attention,), tile, body, work, cuda.variant, cuda.source, CASES, FILES, core)
