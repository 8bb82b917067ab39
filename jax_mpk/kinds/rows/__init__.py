"""Rows: fused element-wise work, row reductions, gathers, and in-place updates of a window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Body
from jax_mpk.ir.graph import Graph, Map, Update
from jax_mpk.ir.loops import apart, flatten, loop_axes
from jax_mpk.kinds.kind import Case, TaskKind, cut, normal
from jax_mpk.kinds.rows import cuda

if TYPE_CHECKING:
    from jax_mpk.kinds.bound import Bound

MIN_COST = 4096
"""Scalar work of the smallest task worth its synchronisation."""
CPU_COLUMNS = 128
"""Columns of the smallest task of an update, unless it is for a GPU, whose threads go through indices side by side."""


def tile(graph: Graph, op: Map | Update, target: Device) -> dict[int, int]:
    """Outer axes first, never along a row that is reduced, nor where stores of an update might collide."""
    cost = max(1.0, sum(e.cost for e in op.exprs().values()))
    wanted = min(target.tasks, int(cost * math.prod(op.domain)) // MIN_COST)
    # Every task of an update goes through all the indices. One that has few columns of a row does little else, on a CPU.
    inner = CPU_COLUMNS if isinstance(op, Update) and target.name == "cpu" else 1
    return cut(loop_axes(op), wanted, _fixed(graph, op), inner)


def _fixed(graph: Graph, op: Map | Update) -> frozenset[int]:
    every = frozenset(range(len(op.domain)))
    if isinstance(op, Update):
        return every - _separate(graph, op)
    outer = every
    for x in E.walk(op.expr):
        if isinstance(x, E.Reduce):
            outer &= x.axes  # a row reduction would be repeated by every task along any other axis
    return every - outer


def _separate(graph: Graph, op: Update) -> frozenset[int]:
    """The window axes along which different indices write different elements, in boxes that do not overlap.

    Those are the axes of the static coordinates. Indices known at run time may collide (and colliding stores happen in
    index order, inside one task), and their boxes cover the whole dimension anyway.
    """
    strides = flatten(graph.values[op.append.out], op.append.coords).strides
    separate = apart(strides)
    return separate if len(separate) == len(strides) else frozenset()


def body(c: Bound, op: Map | Update) -> Body:
    out = Body("ROWS")
    if isinstance(op, Update):
        out.nests["MAIN"], out.in_place = c.append(op.append), True
    else:
        out.nests["MAIN"] = c.nests(op.expr, range(len(op.domain)), c.result())
    return out


def work(op: Map | Update) -> tuple[int, int]:
    return 0, int(math.prod(op.domain) * sum(e.cost for e in op.exprs().values()))


CASES = (
    Case("elementwise", lambda x, y: jnp.tanh(x) * y + jnp.where(x > y, x, -y),
         lambda r: (normal(r, 37, 129), normal(r, 37, 129))),
    Case("layer norm", lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5),
         lambda r: (normal(r, 9, 257),)),
    Case("softmax", jax.nn.softmax, lambda r: (normal(r, 5, 3, 70),)),
    Case("embedding", lambda w, i: w[i], lambda r: (normal(r, 50, 33), r.integers(0, 50, (4, 3)).astype("int32"))),
    Case("update", lambda x, y, i: jax.lax.dynamic_update_slice(x, y, (i, 0)),
         lambda r: (normal(r, 20, 8), normal(r, 3, 8), jnp.int32(5))),
    Case("scatter add", lambda x, i, y: x.at[i].add(y),
         lambda r: (normal(r, 6, 4), r.integers(0, 6, 30).astype("int32"), normal(r, 30, 4))),
)  # fmt: skip

ROWS = TaskKind("rows", (Map, Update), tile, body, work, cuda.variant, cuda.source, CASES)
