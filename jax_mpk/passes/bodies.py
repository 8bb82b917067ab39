"""Pass `bodies`: what the tasks of every grid do, and on a GPU how (`Variant`).

Everything that decides what a worker does at run time is settled here, before anything is proven: whether weights are
streamed, how many workers share a task, what is kept in shared memory and what in the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.ir.boxes import from_rows, rows_of
from jax_mpk.ir.graph import Attention, Graph, Update
from jax_mpk.ir.tasks import READ, WRITE, Buffer, TaskGraph
from jax_mpk.kinds import kind_of
from jax_mpk.kinds.bound import Bound, bind
from jax_mpk.kinds.variant import Variant
from jax_mpk.passes.decompose import buffer_of

ALIGN = 128
RING = 12
"""Frames of the ring, at most: more did not help on an H100."""
FIXED = 160
"""Bytes of shared memory for reductions and counters (struct Shared of cuda/runtime/launch.cuh, which compares)."""


@dataclass(frozen=True)
class Unit:
    """A grid's operator bound to its values, its body, its variant (GPUs), and the number of its prologue (0: none):
    tasks of equal prologue and equal rows start from the same activation."""

    bound: Bound
    body: Body
    variant: Variant | None = None
    prologue: int = 0
    fixed: frozenset[int] = frozenset()
    """The values that the program only reads."""
    partial: int = -1
    """The buffer of what the parts of tasks leave, if there are parts."""


def run(tg: TaskGraph, graph: Graph, device: Device) -> TaskGraph:
    """`tg` with `units`, and on a GPU `shared` and the buffers of what the parts of a task leave."""
    units: list[Unit | None] = []
    prologues: dict[tuple[object, ...], int] = {}
    updated = _updated(graph)
    buffer = buffer_of(graph)
    written = set(tg.boxes.buffer[tg.boxes.mode != READ].tolist())
    fixed = frozenset(v.id for v in graph.values.values() if v.role != "temp" and buffer[v.id] not in written)
    for grid in tg.grids:
        op = graph.ops[grid.op]
        b = bind(graph, op, grid.tile)
        unit = Unit(b, kind_of(op).body(b, op), fixed=fixed)
        if b.lhs and not any(v in updated for v, _ in b.lhs[-1]):
            unit = replace(unit, prologue=prologues.setdefault(b.lhs, len(prologues) + 1))
        units.append(unit)
    if not device.gpu:
        return replace(tg, units=tuple(units))
    for d in (device, replace(device, tensor_copies=False)):
        units = [u and replace(u, variant=kind_of(u.bound.op).variant(u.bound, u.body, d, fixed)) for u in units]
        shared = _shared(units, d)
        if shared.ring > device.window or not any(u and u.variant and u.variant.streamed for u in units):
            break
    return _partial(replace(tg, units=tuple(units), shared=shared))


def _updated(graph: Graph) -> set[int]:
    """The values that live in one buffer with an update: their bytes change while the program runs."""
    out: set[int] = set()
    for op in graph.ops:
        appends = op.appends if isinstance(op, Attention) else (op.append,) if isinstance(op, Update) else ()
        out |= {v for a in appends for v in (a.target, a.out)}
    return out


@dataclass(frozen=True)
class Shared:
    """Shared memory of a worker: bytes for activations, for sums, and everything; frames of the ring; operand pointers
    of a task; and bytes of its own in the workspace."""

    act: int
    acc: int
    total: int
    ring: int
    slots: int
    spill: int


def _shared(units: list[Unit | None], device: Device) -> Shared:
    variants = [u.variant for u in units if u is not None and u.variant is not None]
    act, acc = (-(-max([0, *(getattr(v, f) for v in variants)]) // ALIGN) * ALIGN for f in ("act", "acc"))
    slots = max([1, *(len(u.bound.binder.slots) for u in units if u is not None)])
    fixed = act + acc + 3 * (56 + 8 * slots) + FIXED
    ring = 0
    if any(v.streamed for v in variants):
        ring = min(device.ring or RING, (device.shared - fixed) // (device.frame + 16))
        if ring <= device.window:
            ring = 0
    spill = -(-max([0, *(v.spill for v in variants)]) // ALIGN) * ALIGN
    return Shared(act, acc, fixed + ring * (device.frame + 16), ring, slots, spill)


def _partial(tg: TaskGraph) -> TaskGraph:
    """What the parts of a task leave for the one that ends it, as buffers of the workspace: each task has its slice."""
    buffers, rows = list(tg.buffers), [rows_of(tg.boxes)]
    units = list(tg.units)
    for n, (grid, u) in enumerate(zip(tg.grids, tg.units, strict=True)):
        if u is None or u.variant is None or not u.variant.partial:
            continue
        b = Buffer(len(buffers), "workspace", 0, u.variant.partial * grid.count, "u8", f"parts of {grid.name}")
        buffers.append(b)
        units[n] = replace(u, partial=b.id)
        table = np.zeros((grid.count, 13), np.int64)
        table[:, 0], table[:, 1], table[:, 2] = grid.first + np.arange(grid.count), b.id, WRITE
        table[:, 3], table[:, 4] = np.arange(grid.count) * u.variant.partial, u.variant.partial
        table[:, 5:9] = 1
        rows.append(table)
    table = np.concatenate(rows)
    return replace(
        tg, buffers=tuple(buffers), units=tuple(units), boxes=from_rows(table[np.argsort(table[:, 0], kind="stable")])
    )
