"""Grids and boxes against an enumeration of every point of every tile."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from jax_mpk.device import CPU, H100, Device, cpu
from jax_mpk.ir import expr as E
from jax_mpk.ir import loops
from jax_mpk.ir.boxes import take
from jax_mpk.ir.graph import Graph, GraphError, Sort, itemsize
from jax_mpk.ir.parse import parse
from jax_mpk.ir.tasks import READ, UPDATE, WRITE, TaskGraph
from jax_mpk.kinds.contract import ACCUMULATORS, SHARED_ACCUMULATORS
from jax_mpk.passes import decompose
from jax_mpk.passes.decompose import buffer_of, tiles
from tests.unit.graphs_by_hand import TINY, cut_small, decoder, matmul, task_bytes


def points(op, tg: TaskGraph, t: int, skip: frozenset = frozenset()):
    """Every point of the tile of task `t`: axis id -> index."""
    grid = tg.grids[tg.grid_of[t]]
    axes = loops.loop_axes(op)
    parts = [math.ceil(e / n) for e, n in zip(grid.extent, grid.tile, strict=True)]
    digits = np.unravel_index(int(tg.index[t]), parts) if parts else ()
    ranges = [
        range(int(d) * n, min(e, (int(d) + 1) * n)) for d, n, e in zip(digits, grid.tile, grid.extent, strict=True)
    ]
    for p in itertools.product(*ranges):
        yield {x.axis: i for x, i in zip(axes, p, strict=True)}


def addresses(value, coords, point) -> set[int]:
    """The bytes at `coords`, for every value of what the point does not say."""
    choices = []
    for c, n in zip(coords, value.shape, strict=True):
        if c.dyn is not None:
            choices.append(range(n))
            continue
        own = [c.const]
        for term in c.terms:
            index = [point[term.axis]] if term.axis in point else range(term.extent)
            own = [x + term.coef * ((i // term.div) % (term.mod or 1 << 30)) for x in own for i in index]
        choices.append(own)
    out = set()
    for at in itertools.product(*choices):
        flat = int(np.ravel_multi_index(at, value.shape)) if value.shape else 0
        out |= set(range(flat * itemsize(value.dtype), (flat + 1) * itemsize(value.dtype)))
    return out


def oracle(graph: Graph, tg: TaskGraph) -> None:
    """Writes are exact, and updates at places that do not depend on values; reads and other updates cover what a task
    touches and stay inside the buffer."""
    buffer = buffer_of(graph)
    touched, _ = task_bytes(tg)
    written, changed = (
        task_bytes(TaskGraph(tg.grids, tg.buffers, tg.grid_of, tg.index, take(tg.boxes, tg.boxes.mode == mode)))[0]
        for mode in (WRITE, UPDATE)
    )
    for t in range(tg.tasks):
        op = graph.ops[tg.grids[tg.grid_of[t]].op]
        stored, loaded, updated, exact = set(), set(), set(), True
        for p in points(op, tg, t):
            for e in op.exprs().values():
                for x, ranges in E.walk_loads(e):
                    if all(lo <= p.get(a, lo) < hi for a, lo, hi in ranges):
                        loaded |= {(buffer[x.value], b) for b in addresses(graph.values[x.value], x.coords, p)}
            appends = [op.append] if op.kind == "update" else getattr(op, "appends", ())
            for a in appends:
                updated |= {(buffer[a.out], b) for b in addresses(graph.values[a.out], a.coords, p)}
                exact &= all(c.dyn is None for c in a.coords)
            if op.kind != "update" and not (isinstance(op, Sort) and p[len(op.domain) - 1] >= op.count):
                stored |= {(buffer[op.out], b) for b in addresses(graph.values[op.out], loops.identity(op), p)}
        assert written[t] == stored, tg.task_name(t)
        assert changed[t] == updated if exact else changed[t] >= updated, tg.task_name(t)
        assert loaded | updated | stored <= touched[t], tg.task_name(t)
        assert all(0 <= b < tg.buffers[i].nbytes for i, b in touched[t])


def everything() -> Graph:
    return parse("""
graph everything(x:f32[3,10], y:f32[10,7], w:f32[10,7], i:i32[4], big:bf16[6,10], v:f32[17,9])
  transposed:f32[10,3] = map[i0<10, i1<3]
      expr: x[i1, i0]
  joined:f32[3,17] = map[i0<3, i1<17]
      expr: piece(i1; <10: x[i0, i1]; <17: y[i0, i1-10])
  reversed:bf16[3,10] = map[i0<3, i1<10]
      expr: x[i0, -i1+9]
  row:f32[3] = map[i0<3]
      expr: sum[r0<10](x[i0, r0])
  mm:f32[3,9] = contract[i0<3, i1<9]
      k: k0<17
      lhs: joined[i0, k0]
      rhs0: v[k0, i1]
      epilogue: acc0
  mt:f32[3,7] = contract[i0<3, i1<7]
      k: k0<10
      lhs: x[i0, k0]
      rhs0: y[k0, i1]
      rhs1: w[k0, i1]
      epilogue: (acc1 + row[i0])
  gathered:f32[4,10] = map[i0<4, i1<10]
      expr: big[clamp<5>(i[i0]), i1]
  one:bf16[6,10] = update[i0<2, i1<10]
      to big at [i0+clamp<5>(i[0]), i1], set (out of bounds: clamp)
      expr: reversed[i0, i1]
  two:bf16[6,10] = update[i0<6, i1<3]
      to one at [i0, 3*i1+1], set (out of bounds: clamp)
      expr: transposed[i0, i1]
  three:bf16[6,10] = update[i0<4, i1<10]
      to two at [clamp<5>(i[i0]), i1], add (out of bounds: clamp)
      expr: gathered[i0, i1]
  top:f32[3,2] = sort[i0<3, i1<9]
      descending values count 2
      key: mm[i0, i1]
  return mt, three, top
""")


@pytest.mark.parametrize("tasks", [1, 3, 5, 64])
@pytest.mark.parametrize("limit", [1, 40])
def test_boxes_of_every_kind(tasks, limit, monkeypatch):
    cut_small(monkeypatch, limit, limit)
    graph = everything()
    tg = decompose.run(graph, Device("cpu", 2, 4, tasks))
    oracle(graph, tg)
    if tasks == 64 and limit == 1:
        assert tg.tasks > 4 * len(tg.grids), "the operators are really cut"


@pytest.mark.parametrize("batch", [1, 3])
def test_boxes_of_a_decoder(batch, monkeypatch):
    cut_small(monkeypatch)
    graph = decoder(layers=1, batch=batch, hidden=8, heads=4, kv=2, head=4, ffn=10, keys=5, vocab=11)
    tg = decompose.run(graph, TINY)
    oracle(graph, tg)
    attention = next(g for g in tg.grids if g.kind == "attention")
    assert attention.count == batch * 2
    rows = (tg.grid_of[tg.boxes.task] == tg.grids.index(attention)) & (tg.boxes.mode == UPDATE)
    assert (tg.boxes.run[rows] * tg.boxes.count[rows].prod(1) == 5 * 4 * 4).all(), (
        "an append covers one head's cache only"
    )


def test_every_element_is_stored_once(monkeypatch):
    cut_small(monkeypatch)
    graph = everything()
    tg = decompose.run(graph, TINY)
    buffer = buffer_of(graph)
    for n, op in enumerate(graph.ops):
        if op.kind == "update":
            continue
        mine = (tg.grid_of[tg.boxes.task] == n) & (tg.boxes.mode == WRITE)
        assert (tg.boxes.buffer[mine] == buffer[op.out]).all()
        assert (tg.boxes.run[mine] * tg.boxes.count[mine].prod(1)).sum() == graph.values[op.out].nbytes


def test_buffers_share_in_place_versions():
    graph = everything()
    tg = decompose.run(graph, TINY)
    buffer = buffer_of(graph)
    big, slot = graph.args[4], graph.results[1]
    assert buffer[big] == buffer[slot]
    b = tg.buffers[buffer[big]]
    assert (b.space, b.index, b.alias) == ("result", 1, 4)
    assert [x.id for x in tg.buffers] == list(range(len(tg.buffers)))
    assert sorted(x.index for x in tg.buffers if x.space == "result") == [0, 1, 2]
    assert sorted(x.index for x in tg.buffers if x.space == "arg") == [0, 1, 2, 3, 5]


def test_what_has_no_buffer_is_refused():
    def returning(results: str) -> Graph:
        return parse(f"""
graph f(x:f32[4])
  y:f32[4] = update[i0<4]
      to x at [i0], set (out of bounds: clamp)
      expr: 1.0
  z:f32[4] = map[i0<4]
      expr: y[i0]
  return {results}
""")

    with pytest.raises(GraphError, match="overwritten in place"):
        decompose.run(returning("z"), CPU)
    with pytest.raises(GraphError, match="one buffer"):
        decompose.run(returning("y, y"), CPU)


def sizes(graph: Graph, target: Device) -> list[int]:
    return [g.count for g in decompose.run(graph, target).grids]


SIXTEEN = replace(CPU, tasks=16)
"""A target on which the number of tasks decides tiles, whatever the CPU's own preference is tuned to."""


def test_tiles_do_not_depend_on_the_workers():
    graph = decoder()
    for w in (1, 2, 7):
        assert sizes(graph, replace(CPU, workers=w)) == sizes(graph, CPU)


def contraction(m: int, k: int, n: int) -> Graph:
    return parse(f"graph f(x:f32[{m},{k}], w:f32[{k},{n}])\n{matmul('y', (m, k, n), 'x[i0, k0]', 'w')}  return y")


def tile_of(graph: Graph, target: Device) -> tuple[int, ...]:
    return tiles(graph, graph.ops[0], target)


def test_contraction_tiles():
    assert tile_of(contraction(1, 4096, 4096), SIXTEEN) == (1, 256, 4096)
    assert tile_of(contraction(1, 4096, 4096), CPU) == (1, 4096 // CPU.tasks, 4096)
    assert tile_of(contraction(1, 4096, 12288), H100) == (1, 128, 4096)
    assert tile_of(contraction(1, 64, 64), CPU) == (1, 64, 64), "too small to cut"
    assert tile_of(contraction(1000, 512, 512), CPU)[0] == 64, "prefill: blocks of rows"
    assert tile_of(contraction(4096, 4096, 1), CPU)[0] == 64, "a matrix by a vector: its rows are cut"
    m, n, _ = tile_of(contraction(512, 512, 100000), CPU)
    assert m * n <= ACCUMULATORS and n % CPU.columns == 0


def test_map_tiles():
    def one(shape: str, domain: str, expr: str) -> Graph:
        return parse(f"graph f(x:f32[{shape}])\n  y:f32[{shape}] = map[{domain}]\n      expr: {expr}\n  return y")

    assert tile_of(one("4", "i0<4", "x[i0]"), CPU) == (4,), "tiny: one task"
    assert tile_of(one(f"{1 << 20}", f"i0<{1 << 20}", "x[i0]"), SIXTEEN) == (1 << 16,)
    norm = one("64,4096", "i0<64, i1<4096", "(x[i0, i1] * max[r0<4096](x[i0, r0]))")
    assert tile_of(norm, SIXTEEN) == (4, 4096), "a row reduction keeps rows whole"


def test_update_tiles(monkeypatch):
    cut_small(monkeypatch)
    graph = parse("""
graph f(x:f32[64,2048], i:i32[32], y:f32[32,2048])
  z:f32[64,2048] = update[i0<32, i1<2048]
      to x at [clamp<63>(i[i0]), i1], add (out of bounds: clamp)
      expr: y[i0, i1]
  return z
""")
    assert tile_of(graph, SIXTEEN) == (32, 128), "rows may collide: only the columns are cut"
    tg = decompose.run(graph, SIXTEEN)
    assert not (tg.boxes.mode == WRITE).any() and ((tg.boxes.mode == UPDATE).sum(), tg.tasks) == (16, 16)
    assert READ in tg.boxes.mode


def test_the_empty_graph():
    tg = decompose.run(parse("graph f(x:f32[3])\n  return x"), CPU)
    assert tg.tasks == 0 and tg.buffers[0].alias == 0


@pytest.mark.parametrize("processors, workers, tasks", [(1, 2, 4), (2, 2, 4), (3, 3, 8), (16, 16, 32), (256, 32, 64)])
def test_a_machine_with_more_processors_gets_more_tasks(processors, workers, tasks):
    target = cpu(processors)
    assert (target.workers, target.tasks) == (workers, tasks)
    assert sizes(contraction(1, 4096, 4096), target) == [tasks]


@pytest.mark.parametrize("rows", [8, 16])
def test_tasks_with_too_many_accumulators_become_equal_turns(rows):
    m, n, _ = tile_of(contraction(rows, 4096, 151936), H100)
    assert m == rows and m * n <= SHARED_ACCUMULATORS
    turns = math.ceil(math.ceil(151936 / n) / H100.tasks)
    assert turns > 1 and turns * n < 1.01 * 151936 / H100.tasks, "the busiest worker has no more than the others"
