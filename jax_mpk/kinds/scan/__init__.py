"""Running sums, products, maxima and minima along one axis: a row is one task, whatever its length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk import abi
from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.ir.graph import Graph, Scan
from jax_mpk.ir.loops import loop_axes
from jax_mpk.kinds.kind import Case, TaskKind, cut, normal
from jax_mpk.kinds.rows import MIN_COST
from jax_mpk.kinds.scan import cuda

if TYPE_CHECKING:
    from jax_mpk.kinds.bound import Bound

COMBINE = {"logsumexp": 100}
"""Scalar work of combining two elements, where it is more than 2."""


def tile(graph: Graph, op: Scan, target: Device) -> dict[int, int]:
    """Whole rows."""
    return cut(loop_axes(op), min(target.tasks, work(op)[1] // MIN_COST), frozenset((op.axis,)))


def body(c: Bound, op: Scan) -> Body:
    out = Body("SCAN")
    row = c.row_scratch(abi.SLOT_ACC, op.element.dtype, op.axis)
    every = range(len(op.domain))
    out.nests["MAIN"] = c.nests(op.element, every, row)
    out.nests["EPILOGUE"] = c.nests(op.epilogue, every, c.result(), {0: row})
    out.params |= {"REDUCE_DTYPE": abi.enum("Dtype", op.element.dtype.upper()),
                   "SCAN_OP": abi.enum("ScanOp", op.how.upper()), "REVERSE": int(op.reverse)}  # fmt: skip
    return out


def core(op: Scan) -> int:
    return math.prod(op.domain) * COMBINE.get(op.how, 2)


def work(op: Scan) -> tuple[int, int]:
    return 0, int(math.prod(op.domain) * (op.element.cost + op.epilogue.cost)) + core(op)


def _integers(r: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return r.integers(info.min, info.max, shape, dtype, endpoint=True)


def _zeros(r: np.random.Generator) -> np.ndarray:
    """Zeros of both signs, and in some rows infinities or a NaN."""
    x = np.where(r.random((5, 70)) < 0.5, np.float32(-0.0), np.float32(0))
    x[2, 30], x[3, 40], x[4, 20], x[4, 50] = np.nan, np.inf, -np.inf, np.inf
    return x


def _top_p(x: jax.Array) -> jax.Array:
    p = jax.nn.softmax(jnp.sort(x, -1))
    return jnp.where(jnp.cumsum(p, -1) - p < 0.9, p, -jnp.inf)


CASES = (
    Case("sums", lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 1, reverse=True)), lambda r: (normal(r, 3, 49),)),
    Case("a long row", lambda x: (jnp.cumsum(x), lax.cumsum(x, reverse=True)), lambda r: (normal(r, 5003),)),
    Case("a row beyond shared memory", lambda x: (jnp.cumsum(x), lax.cummax(x, reverse=True)), lambda r: (normal(r, 20_011),)),
    Case("products", lambda x: (lax.cumprod(x, 1), lax.cumprod(x, 1, reverse=True)),
         lambda r: (r.uniform(0.9, 1.1, (2, 300)).astype("float32"),)),
    Case("extremes", lambda x: (lax.cummax(x, 1), lax.cummin(x, 1, reverse=True), lax.cummin(x, 1)),
         lambda r: (normal(r, 4, 1000),)),
    Case("zeros and infinities", lambda x: (lax.cummax(x, 1), lax.cummin(x, 1), jnp.cumsum(x, 1)), lambda r: (_zeros(r),)),
    Case("axes before and behind", lambda x: (jnp.cumsum(x, 1), lax.cummax(x, 0, reverse=True), lax.cumsum(x, 2, reverse=True)),
         lambda r: (normal(r, 64, 65, 3),)),
    Case("of a softmax", lambda x: jnp.cumsum(jax.nn.softmax(x), -1), lambda r: (normal(r, 3, 200),)),
    Case("top p", _top_p, lambda r: (normal(r, 2, 260),)),
    Case("epilogue", lambda x, y: jnp.tanh(jnp.cumsum(x, 1) * 0.1) + y, lambda r: (normal(r, 3, 600), normal(r, 3, 600))),
    Case("bf16", lambda x: lax.cummax(x, 1, reverse=True), lambda r: (normal(r, 3, 64, dtype=jnp.bfloat16),)),
    Case("i32", lambda x: (jnp.cumsum(x), lax.cumprod(x, reverse=True), lax.cummin(x)), lambda r: (_integers(r, "int32", 1000),)),
    Case("u32", lambda x: (jnp.cumsum(x, 0), lax.cummax(x, 1), lax.cummin(x, 1)), lambda r: (_integers(r, "uint32", 64, 51),)),
    Case("i8", lambda x: (jnp.cumsum(x, 1, dtype="int8"), lax.cummax(x, 0), lax.cumprod(x, 1)),
         lambda r: (_integers(r, "int8", 50, 64),)),
    Case("logarithms of sums", lambda x: (lax.cumlogsumexp(x, 1), lax.cumlogsumexp(x, 1, reverse=True)),
         lambda r: (normal(r, 2, 300) * 9,)),
)  # fmt: skip

SCAN = TaskKind("scan", (Scan,), tile, body, work, cuda.variant, cuda.source, CASES, ("kinds/scan.cuh",), core)
