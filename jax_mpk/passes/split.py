"""Pass `split`: contractions over weights are split over the contracted axis (split-K), where that pays.

On a device with many workers that is where columns alone give too few tasks. On a CPU it is where the weights are
large and lie row by row: a slice of rows is contiguous memory, which streams, while a slice of columns is short runs.

`acc[m, n] = sum_k` becomes `part[s, m, n] = sum over the k of slice s`, a contraction with one more batch axis, and a
map that adds the slices in order and applies the epilogue. The fuse pass then writes that map into its consumers, so
the sum costs no hop. A contraction with several accumulators (gate and up) is first taken apart. The order of the
sum is fixed by the slices: deterministic, but not bit-equal to the unsplit sum. How many there are does not depend on the
rows of the other operand, so that a row has the same bits whatever comes with it.

Contractions of one left operand (Q, K and V) get equal slices on a device that streams: then their tasks have equal
prologues, and a worker computes the norm and the sum before it once for all of them (see the pass `placement`).

A contraction with several accumulators is taken apart on a device that streams if what the busiest worker streams less is
more than what the readers of the parts read more: one task of both operands is the coarsest unit that there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeGuard

from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Expr
from jax_mpk.ir.graph import Contract, Graph, Map, Op, Value, itemsize
from jax_mpk.kinds.contract import SHARED_ACCUMULATORS
from jax_mpk.kinds.contract.even import busiest, widths
from jax_mpk.passes.axes import inverse
from jax_mpk.passes.simplify import replace_acc
from jax_mpk.passes.substitute import at

SLICES = 8
"""At most this many slices: the consumer of the sum reads all of them."""
SLICE_K = 128
"""A slice is a multiple of this many k: one frame of the weight stream."""
NEAR, COMBINED = 0.7, 2.7
"""What a byte that a prologue reads takes, of what one takes that is streamed (23 KB/us): a norm's 32 KB/us
(GPU-FINDINGS.md), and 8.6 KB/us where several accumulators are combined (docs/measurements.md, run 32)."""
SPARE = 1.2
"""How much faster than on average a worker streams while others do not (an H100, as the others: ratios of one machine)."""
PARTS = 70 << 10
"""Streamed bytes in the time that a prologue loses when it adds slices of several accumulators."""
HOP = 50 << 10
"""Streamed bytes in the time of a hop: rows that are read at too many places become an operator of their own."""
ROWS_K = 16
"""The same for slices of rows on a CPU."""
ROWS_BYTES = 1 << 18
"""Weights of at least this size are cut by rows."""
ROWS_M = 16
"""Rows of the other operand up to which a contraction is a stream of weights rather than arithmetic."""


def run(g: Graph, target: Device) -> Graph:
    """The graph with every contraction over weights cut as `target` likes it."""
    if not target.gpu and not target.rows:
        return g
    values = dict(g.values)
    together = _alone(g, target) | _together(g, target) if target.gpu else {}
    ops: list[Op] = []
    for op in g.ops:
        pieces = _split(values, op, target, together.get(op.out, 0)) if isinstance(op, Contract) else None
        ops.extend(pieces or [op])
    return g.with_ops(ops, values)


def _of_weights(op: Op, values: dict[int, Value]) -> TypeGuard[Contract]:
    return (
        isinstance(op, Contract)
        and op.lhs.dtype == "f32"
        and len(op.k) == 1
        and all(values[v].role != "temp" for r in op.rhs for v in r.loads)
    )


def _split(values: dict[int, Value], op: Contract, target: Device, together: int) -> list[Op] | None:
    """`op` in `together` slices (0: as many as suit it alone), or None to leave it."""
    if not _of_weights(op, values):
        return None
    slices = together or (1 if target.gpu else _row_slices(values, op, target))
    if slices == 1 and not target.gpu:
        return None
    if slices == 1 and (len(op.rhs) == 1 or not together):
        return None
    out: list[Op] = []
    sums: list[Expr] = []
    try:
        for j, r in enumerate(op.rhs):
            part, total = _slice(values, op, r, slices, slices == 1 and _is_rounded(op.epilogue, j))
            out.append(part)
            sums.append(total)
    except E.NotAffine:
        return None  # a slice would cut through a digit of k (a head of an attention's output)
    body = replace_acc(op.epilogue, sums)
    shape = values[op.out].shape
    back = inverse(op.store, op.domain, shape) if op.store is not None else None
    if back is not None:  # on the axes of the result, so that it can be written into consumers
        return [*out, Map(op.out, shape, op.source, None, at(body, back))]
    return [*out, Map(op.out, op.domain, op.source, op.store, body)]


def _columns(op: Contract) -> int:
    return math.prod(op.domain[a] for a in op.axes("n"))


def _tasks(op: Contract, target: Device) -> int:
    """Tasks without slices, of the fewest columns."""
    batch = math.prod(op.domain[a] for a in op.axes("batch"))
    return -(-_columns(op) // target.columns) * batch * len(op.rhs)


def _slices(k: int, tasks: int, target: Device) -> int:
    """The largest number of equal slices, of whole frames, that keeps the tasks within one per worker."""
    fits = [s for s in range(1, SLICES + 1) if k % (s * SLICE_K) == 0 and tasks * s <= target.tasks]
    return max(fits, default=1)


def _together(g: Graph, target: Device) -> dict[int, int]:
    """Output -> slices, for contractions that share a left operand: the fewest that balance all of them."""
    groups: dict[tuple[object, ...], list[Contract]] = {}
    for op in g.ops:
        if _of_weights(op, g.values) and len(op.rhs) == 1 and not op.axes("batch"):
            rows = tuple((a, op.domain[a]) for a in op.axes("m"))
            groups.setdefault((op.lhs, op.k, rows), []).append(op)
    out: dict[int, int] = {}
    for ops in groups.values():
        if len(ops) > 1:
            k = ops[0].k[0][1]
            most = max(_slices(k, _tasks(op, target), target) for op in ops)
            columns = tuple(_columns(op) for op in ops)
            fits = [s for s in range(1, most + 1) if k % (s * SLICE_K) == 0]
            slices = min(fits, key=lambda s: (_load(k, columns, s, target), s), default=1)
            out |= {op.out: slices for op in ops}
    return out


def _load(k: int, columns: tuple[int, ...], slices: int, target: Device, rhs: int = 1) -> int:
    """The most weights (k x columns) that a worker gets when contractions over one k, cut into `slices`, are dealt to
    the workers; their tasks are as wide as `target.tasks` tasks an operator allow."""
    width = widths(columns, slices, target.tasks, target.columns, SHARED_ACCUMULATORS)
    return busiest(columns, width, slices, target.tasks) * rhs * (k // slices)


def _alone(g: Graph, target: Device) -> dict[int, int]:
    """Output -> slices, for contractions that are better cut; one with several accumulators is taken apart first."""
    readers = g.consumers()
    out: dict[int, int] = {}
    for op in g.ops:
        if not _of_weights(op, g.values):
            continue
        k, many = op.k[0][1], len(op.rhs)
        if math.prod(op.domain[a] for a in op.axes("batch")) > 1:
            if many == 1:
                out[op.out] = _slices(k, _tasks(op, target), target)
            continue
        weight = max(itemsize(g.values[v].dtype) for r in op.rhs for v in r.loads)
        size = itemsize(g.values[op.out].dtype)
        cost = _Cost(k, _columns(op), many, weight, math.prod(op.domain[a] for a in op.axes("m")),
                     _shares(g, readers, op, target), all(_is_rounded(op.epilogue, j) for j in range(many)), target)  # fmt: skip
        alone = replace(cost, rows=1)  # slices fix the order of a row's sum, which no other row may change
        fits = [s for s in range(1 if many > 1 else 2, SLICES + 1) if k % (s * SLICE_K) == 0]
        best = min(fits, key=alone.parts, default=1)
        if best > 1 and alone.parts(best) < alone.whole(size):
            out[op.out] = best
        elif many > 1 and cost.parts(1) < cost.whole(size):
            out[op.out] = 1
    return out


@dataclass(frozen=True)
class _Cost:
    """What a contraction takes, in bytes that a worker streams meanwhile: weights of the busiest worker's frames, which
    come faster while others have none, and what a task of each reader reads, which nothing hides.

    k, n: extents; many: accumulators; weight: bytes of a weight; rows: of the left operand; share: slices into which
    readers cut a row; rounded: parts without slices are bf16.
    """

    k: int
    n: int
    many: int
    weight: int
    rows: int
    share: int
    rounded: bool
    target: Device

    def whole(self, size: int) -> float:
        """As it is, with results of `size` bytes."""
        return self._stream(_load(self.k, (self.n,), 1, self.target, self.many)) + self._read(size)

    def parts(self, slices: int) -> float:
        """Every accumulator for itself, in slices."""
        size = 2 if self.rounded and slices == 1 else 4
        more = PARTS if self.many > 1 and slices > 1 else 0
        load = _load(self.k, (self.n,) * self.many, slices, self.target)
        return self._stream(load) + self._read(self.many * slices * size) + more

    def _stream(self, load: int) -> float:
        return self.weight * max(load / SPARE, self.k * self.n * self.many / self.target.workers)

    def _read(self, size: int) -> float:
        """What every task takes that reads `size` bytes for each element; rows too large to be read by all get a hop."""
        row = (NEAR if self.many == 1 else COMBINED) * size * self.n
        return row * self.rows / self.share if self.share > 1 else min(row * self.rows, row + HOP)


def _shares(g: Graph, readers: dict[int, list[Op]], op: Contract, target: Device) -> int:
    """Into how many slices the readers of a result cut it; 1 if some task reads all of it."""
    found, todo, seen = [], [op.out], {op.out}
    while todo:
        for user in readers[todo.pop()]:
            if isinstance(user, Map) and not user.expr.height:
                if user.out not in seen:
                    seen.add(user.out)
                    todo.append(user.out)
            elif isinstance(user, Contract) and len(user.k) == 1 and user.k[0][1] == _columns(op):
                found.append(_slices(user.k[0][1], _tasks(user, target), target))
            else:
                found.append(1)
    return min(found, default=1)


def _is_rounded(e: Expr, j: int) -> bool:
    """Whether accumulator `j` is rounded to bf16 before anything else: then its part can be kept so."""
    return all(
        isinstance(x, E.Unary) and x.op == "round_bf16"
        for x in E.walk(e)
        if any(isinstance(a, E.Acc) and a.index == j for a in x.args())
    )


def _row_slices(values: dict[int, Value], op: Contract, target: Device) -> int:
    """One slice of contiguous rows a task, for large weights whose columns are contiguous; 1 for all others."""
    k, columns = op.k[0][1], op.axes("n")
    if op.axes("batch") or math.prod(op.domain[a] for a in op.axes("m")) > ROWS_M:
        return 1
    for r in op.rhs:
        last = r.coords[-1].axes()  # type: ignore[attr-defined]
        if values[next(iter(r.loads))].nbytes < ROWS_BYTES or not last or not last <= frozenset(columns):
            return 1
    return max((s for s in range(1, min(SLICES, target.tasks) + 1) if k % (s * ROWS_K) == 0), default=1)


def _slice(values: dict[int, Value], op: Contract, rhs: Expr, slices: int, rounded: bool) -> tuple[Contract, Expr]:
    """One accumulator as a contraction over slices (domain axis 0), and the ordered sum of its slices; `rounded`: kept as bf16."""
    axis, extent = op.k[0]
    step = extent // slices
    up = {a: E.coord_axis(a + 1, n) for a, n in enumerate(op.domain)}
    if slices > 1:
        slice_axis = E.coord_scale(E.coord_axis(0, slices), step)
        point = {**up, axis: E.coord_add(slice_axis, E.coord_axis(axis, step))}
        domain: tuple[int, ...] = (slices, *op.domain)
    else:
        point, domain = {}, op.domain
    new = max(values) + 1
    values[new] = Value(new, domain, "bf16" if rounded else "f32", name="")
    acc = E.acc(0, range(len(domain)))
    lhs, r = (E.substitute_axes(e, point) if point else e for e in (op.lhs, rhs))
    part = Contract(new, domain, op.source, None, lhs, (r,), ((axis, step),),
                    E.unary("round_bf16", acc) if rounded else acc)  # fmt: skip
    here = tuple(E.coord_axis(a, n) for a, n in enumerate(op.domain))
    total: Expr | None = None
    for s in range(slices):
        coords = (E.coord_const(s), *here) if slices > 1 else here
        x = E.load(new, coords, "f32")
        total = x if total is None else E.binary("add", total, x)
    assert total is not None
    return part, total
