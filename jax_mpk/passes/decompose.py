"""Decomposition: operators become grids of tasks, values become buffers, accesses become boxes of bytes.

How an operator is cut depends on its shape and on the target only, never on the number of workers of a run, so the same
program gives the same bits anywhere. Boxes follow from the accesses of `jax_mpk.ir.loops`; nobody writes one by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir import loops
from jax_mpk.ir.boxes import Touch, expand, from_rows, rows_of
from jax_mpk.ir.graph import Graph, GraphError, Op, Sort, itemsize
from jax_mpk.ir.tasks import READ, UPDATE, WRITE, Buffer, Grid, TaskGraph
from jax_mpk.kinds import kind_of


def run(graph: Graph, target: Device) -> TaskGraph:
    """The task graph with `grids`, `buffers`, `grid_of`, `index` and `boxes`; `graph` is refined."""
    buffers, buffer = _buffers(graph)
    cache: dict[tuple[object, ...], np.ndarray] = {}
    grids: list[Grid] = []
    rows = [rows_of(expand((), (), ()))]
    first = 0
    for n, op in enumerate(graph.ops):
        axes = loops.loop_axes(op)
        extent = tuple(x.extent for x in axes)
        tile = tiles(graph, op, target)
        slots: dict[int, int] = {}
        touches = tuple(dict.fromkeys(_touches(graph, op, axes, buffer, slots)))
        key = (extent, tile, touches)
        if key not in cache:
            cache[key] = rows_of(expand(extent, tile, touches))
        count = math.prod(math.ceil(e / t) for e, t in zip(extent, tile, strict=True))
        r = cache[key].copy()
        r[:, 0] += first
        r[:, 1] = np.array(list(slots), np.int64)[r[:, 1]]
        rows.append(r)
        name = graph.values[op.out].name or f"{op.kind}{n}"
        grids.append(Grid(n, op.kind, name, extent, tile, first, count, str(op.source)))
        first += count
    sizes = np.array([g.count for g in grids], np.int64)
    grid_of = np.repeat(np.arange(len(grids), dtype=np.int32), sizes)
    index = (np.arange(first) - np.repeat(np.cumsum(sizes) - sizes, sizes)).astype(np.int32)
    return TaskGraph(tuple(grids), buffers, grid_of, index, from_rows(np.concatenate(rows)))


# -------------------------------------------------------------------------------------------------------------- buffers


def buffer_of(graph: Graph) -> dict[int, int]:
    """The buffer id of every value; in-place versions of a value share one buffer."""
    return _buffers(graph)[1]


def _buffers(graph: Graph) -> tuple[tuple[Buffer, ...], dict[int, int]]:
    root = {i: i for i in graph.values}
    last = dict(root)
    for op in graph.ops:
        for old, new in op.inplace():
            root[new] = root[old]
            last[root[new]] = new
    result: dict[int, int] = {}  # root -> result number
    for n, r in enumerate(graph.results):
        if root[r] in result:
            raise GraphError(
                f"results {result[root[r]]} and {n} are one buffer ({graph.value_name(r)}): copy one of them"
            )
        if graph.values[root[r]].role == "const":
            raise GraphError(f"result {n} is the constant {graph.value_name(r)}: copy it")
        result[root[r]] = n
    groups: dict[str, list[int]] = {"arg": [], "const": [], "result": [], "workspace": []}
    for i in dict.fromkeys((*graph.args, *graph.values)):
        v = graph.values[i]
        if root[i] != i:
            continue
        if v.role != "temp" and last[i] != i and i not in result:
            raise GraphError(f"{v} is overwritten in place, but its last version is no result: copy it first")
        groups["result" if i in result else "workspace" if v.role == "temp" else v.role].append(i)
    groups["result"].sort(key=result.__getitem__)
    buffers: list[Buffer] = []
    for space, roots in groups.items():
        for n, i in enumerate(roots):
            v = graph.values[i]
            index = v.index if space == "arg" else result[i] if space == "result" else n
            alias = v.index if space == "result" and v.role == "arg" else -1
            name = graph.value_name(i)
            buffers.append(Buffer(len(buffers), space, index, v.nbytes, v.dtype, name, -1, alias, v.data))
    at = {i: n for n, i in enumerate(i for roots in groups.values() for i in roots)}
    return tuple(buffers), {i: at[root[i]] for i in graph.values}


# ---------------------------------------------------------------------------------------------------------------- boxes


def _touches(graph: Graph, op: Op, axes: tuple[loops.LoopAxis, ...], buffer: dict[int, int],
             slots: dict[int, int]) -> Iterator[Touch]:  # fmt: skip
    """Every access; `slots` numbers the buffers in order of appearance, so that equal layers give equal touches."""
    position = {x.axis: (n, x.extent) for n, x in enumerate(axes)}

    def touch(access: loops.Access, mode: int, ranges: E.Ranges, store: bool) -> Touch:
        size = itemsize(graph.values[access.value].dtype)
        bound = {a: (lo, hi) for a, lo, hi in ranges}
        dims = []
        for axis, stride, n in access.strides:
            at, n = position.get(axis, (-1, n))
            lo, hi = bound.get(axis, (0, n))
            dims.append((at, stride * size, max(lo, 0), min(hi, n)))
        dims += [(-1, d.stride * size, 0, d.extent if store else d.limit + 1) for d in access.dyn]
        slot = slots.setdefault(buffer[access.value], len(slots))
        return Touch(slot, mode, size, access.offset * size, tuple(dims))

    def empty(ranges: E.Ranges) -> bool:
        return any(hi <= lo for _, lo, hi in ranges)

    for _role, _load, access, ranges in loops.loads(graph, op):
        if not empty(ranges):
            yield touch(access, READ, ranges, False)
    for _role, access, append in loops.stores(graph, op):
        ranges = ((axes[-1].axis, 0, op.count),) if isinstance(op, Sort) else ()
        if append is not None and append.mode != "set" and not access.dyn:
            yield touch(access, READ, ranges, True)
        yield touch(access, WRITE if append is None else UPDATE, ranges, True)


# ---------------------------------------------------------------------------------------------------------------- tiles


def tiles(graph: Graph, op: Op, target: Device) -> tuple[int, ...]:
    """The tile of every loop axis, as the operator's task kind cuts it."""
    tile = kind_of(op).tile(graph, op, target)
    return tuple(tile.get(x.axis, max(1, x.extent)) for x in loops.loop_axes(op))
