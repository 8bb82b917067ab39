"""Decomposition: operators become grids of tasks, values become buffers, accesses become boxes of bytes.

How an operator is cut depends on its shape and on the target only, never on the number of workers of a run, so the same
program gives the same bits anywhere. Boxes follow from the accesses of `jax_mpk.ir.loops`; nobody writes one by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from jax_mpk.ir import expr as E
from jax_mpk.ir import loops
from jax_mpk.ir.graph import Attention, Contract, Graph, GraphError, Map, Op, Sort, Update, itemsize
from jax_mpk.ir.tasks import READ, UPDATE, WRITE, Buffer, Grid, TaskGraph
from jax_mpk.passes.boxes import Touch, expand, from_rows, rows_of
from jax_mpk.targets import Target

MIN_COST = 4096
"""Scalar work of the smallest task worth its synchronisation."""
MIN_MACS = 1 << 14
"""Multiply-adds of the smallest contraction task."""
ROWS = (16, 64)
"""Rows of a block when the rows of a contraction or of attention are cut: at least, at most."""
ACCUMULATORS = 1 << 18
"""Accumulators (f32 scratch) that a contraction task may need."""


def run(graph: Graph, target: Target) -> TaskGraph:
    """The task graph with `grids`, `buffers`, `grid_of`, `index` and `boxes`; `graph` is refined."""
    buffers, buffer = _buffers(graph)
    cache: dict[tuple, np.ndarray] = {}
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
            cache[key] = rows_of(expand(*key))
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


# --------------------------------------------------------------------------------------------------------------- buffers


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
            raise GraphError(f"results {result[root[r]]} and {n} are one buffer ({graph.value_name(r)}): copy one of them")
        if graph.values[root[r]].role == "const":
            raise GraphError(f"result {n} is the constant {graph.value_name(r)}: copy it")
        result[root[r]] = n
    groups: dict[str, list[int]] = {"arg": [], "const": [], "result": [], "workspace": []}
    for i in (*graph.args, *(i for i in graph.values if i not in graph.args)):
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


# ----------------------------------------------------------------------------------------------------------------- boxes


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
        if append is not None and append.mode == "add" and not access.dyn:
            yield touch(access, READ, ranges, True)
        yield touch(access, UPDATE if access.dyn else WRITE, ranges, True)


# ----------------------------------------------------------------------------------------------------------------- tiles


def tiles(graph: Graph, op: Op, target: Target) -> tuple[int, ...]:
    """The tile of every loop axis."""
    axes = loops.loop_axes(op)
    if isinstance(op, Contract):
        tile = _contract(op, axes, target)
    elif isinstance(op, Attention):
        tile = _attention(op, axes)
    else:
        fixed = _fixed(graph, op)
        cost = max(1.0, sum(e.cost for e in op.exprs().values()))
        if isinstance(op, Sort):
            cost *= max(1, math.ceil(math.log2(max(2, op.domain[-1]))))
        wanted = min(target.tasks, int(cost * math.prod(op.domain)) // MIN_COST)
        tile = _cut(axes, wanted, fixed)
    return tuple(tile.get(x.axis, max(1, x.extent)) for x in axes)


def _cut(axes: Iterable[loops.LoopAxis], wanted: int, fixed: frozenset[int] = frozenset(), inner: int = 1) -> dict[int, int]:
    """Tiles that give about `wanted` tasks, outer axes first; the innermost axis is cut in multiples of `inner`."""
    tile: dict[int, int] = {}
    axes = list(axes)
    for n, x in enumerate(axes):
        if wanted <= 1 or x.axis in fixed or x.extent <= 1:
            continue
        t = math.ceil(x.extent / min(x.extent, wanted))
        if n == len(axes) - 1:
            t = min(x.extent, math.ceil(t / inner) * inner)
        tile[x.axis] = t
        wanted = math.ceil(wanted / math.ceil(x.extent / t))
    return tile


def _fixed(graph: Graph, op: Op) -> frozenset[int]:
    """The domain axes along which an operator is not cut."""
    every = frozenset(range(len(op.domain)))
    if isinstance(op, Sort):
        return frozenset((len(op.domain) - 1,))
    if isinstance(op, Update):
        return every - _separate(graph, op)
    assert isinstance(op, Map)
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
    a = op.append
    access = loops.flatten(graph.values[a.out], a.coords)
    span = 1
    for _axis, stride, n in sorted(access.strides, key=lambda x: abs(x[1])):
        if abs(stride) < span:
            return frozenset()  # not injective
        span += abs(stride) * (n - 1)
    return frozenset(axis for axis, _, _ in access.strides)


def _contract(op: Contract, axes: tuple[loops.LoopAxis, ...], target: Target) -> dict[int, int]:
    role = {r: [x for x in axes if x.role == r] for r in ("batch", "m", "n", "k")}
    batch, m, n, k = (math.prod(x.extent for x in role[r]) for r in ("batch", "m", "n", "k"))
    wanted = min(target.tasks, max(1, batch * m * n * k * len(op.rhs) // MIN_MACS))
    tile: dict[int, int] = {}
    if role["m"]:
        across = batch * max(1, n // target.columns)
        rows = m
        if m > ROWS[1] or (m > ROWS[0] and across < wanted):
            rows = min(ROWS[1], max(ROWS[0], math.ceil(m * across / wanted)))
        x = role["m"][0]
        tile[x.axis] = min(x.extent, max(1, rows // max(1, m // max(1, x.extent))))
        m = tile[x.axis] * (m // max(1, x.extent))
        wanted = math.ceil(wanted / max(1, math.ceil(x.extent / tile[x.axis])))
    for axis, t in _cut(role["batch"], wanted).items():
        tile[axis] = t
        wanted = math.ceil(wanted / math.ceil(op.domain[axis] / t))
    if role["n"]:
        x = role["n"][0]
        inner = max(1, n // max(1, x.extent))
        most = max(target.columns, ACCUMULATORS // max(1, m * len(op.rhs)) // target.columns * target.columns)
        columns = min(most, max(target.columns, math.ceil(n / wanted)))
        step = target.columns // math.gcd(inner, target.columns)
        step = step if step * inner <= max(columns, 2 * target.columns) else 1
        tile[x.axis] = max(1, min(x.extent, math.ceil(max(1, columns // inner) / step) * step))
    return tile


def _attention(op: Attention, axes: tuple[loops.LoopAxis, ...]) -> dict[int, int]:
    """One task a batch point; its rows are cut into ranges of the flattened row index when nothing is appended."""
    tile = {x.axis: 1 for x in axes if x.role == "batch"}
    rows = [x for x in axes if x.role == "rows"]
    inner = math.prod(x.extent for x in rows)
    for x in rows if not op.appends else ():
        if inner <= ROWS[1]:
            break
        inner //= max(1, x.extent)
        tile[x.axis] = max(1, min(x.extent, ROWS[1] // max(1, inner)))
    return tile
