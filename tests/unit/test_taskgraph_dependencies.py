"""Dependencies against byte-level conflicts of every pair of tasks."""

from __future__ import annotations

import numpy as np
import pytest

from jax_mpk.ir.boxes import from_rows, rows_of
from jax_mpk.ir.parse import parse
from jax_mpk.ir.tasks import READ, WRITE, Boxes, Buffer, Grid, TaskGraph
from jax_mpk.passes import decompose, dependencies
from tests.unit.graphs_by_hand import (
    TINY,
    brute_conflicts,
    closure,
    cut_small,
    decoder,
    dense,
    random_program,
)
from tests.unit.test_taskgraph_boxes import random_boxes
from tests.unit.test_taskgraph_decompose import everything


def exact(tg: TaskGraph) -> None:
    """The dependencies are the transitive reduction of the conflicts, no more and no less."""
    conflicts = closure(brute_conflicts(tg))
    deps = dense(tg.deps, tg.tasks)
    assert (closure(deps) == conflicts).all()
    longer = (conflicts.astype(np.float32) @ conflicts.astype(np.float32)) > 0
    assert (deps == (conflicts & ~longer)).all(), "an edge is implied by others"
    for t in range(tg.tasks):
        row = tg.deps.row(t)
        assert (np.diff(row) > 0).all() and (row < t).all()


def random_graph(seed: int, grids: int, buffers: int, reads: float, most: int = 4) -> TaskGraph:
    """Grids of tasks with random strided boxes: partial overwrites, tasks of one grid that collide, updates."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most + 1, grids)
    first = np.cumsum(sizes) - sizes
    kinds = [
        Grid(n, "map", f"g{n}", (int(s),), (1,), int(f), int(s))
        for n, (s, f) in enumerate(zip(sizes, first, strict=True))
    ]
    tasks = int(sizes.sum())
    rows = rows_of(random_boxes(rng, 3 * tasks, [(64, 16, 8), (32, 8), (40,), ()]))
    rows[:, 0] = np.sort(rng.integers(0, tasks, len(rows)))
    rows[:, 1] = rng.integers(0, buffers, len(rows))
    rows[:, 2] = np.where(rng.random(len(rows)) < reads, READ, np.maximum(rows[:, 2], WRITE))
    some = [Buffer(n, "workspace", n, 512, "u8", f"b{n}") for n in range(buffers)]
    grid_of = np.repeat(np.arange(grids, dtype=np.int32), sizes)
    index = (np.arange(tasks) - first[grid_of]).astype(np.int32)
    return TaskGraph(tuple(kinds), tuple(some), grid_of, index, from_rows(rows))


@pytest.mark.parametrize("reads", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("buffers", [1, 3, 12])
@pytest.mark.parametrize("seed", range(6))
def test_random_boxes(seed, buffers, reads):
    tg = dependencies.run(random_graph(seed, 12, buffers, reads))
    exact(tg)


def test_random_boxes_do_collide_inside_a_grid():
    tg = dependencies.run(random_graph(0, 12, 1, 0.2))
    assert (tg.grid_of[tg.deps.row_of()] == tg.grid_of[tg.deps.data]).any()
    exact(tg)


@pytest.mark.parametrize("tasks", [1, 3, 64])
def test_every_kind_of_operator(tasks, monkeypatch):
    cut_small(monkeypatch)
    target = type(TINY)("cpu", 2, 4, tasks)
    exact(dependencies.run(decompose.run(everything(), target)))


@pytest.mark.parametrize("batch", [1, 2])
def test_decoder(batch, monkeypatch):
    cut_small(monkeypatch)
    graph = decoder(layers=3, batch=batch, hidden=8, heads=4, kv=2, head=4, ffn=10, keys=5, vocab=11)
    tg = dependencies.run(decompose.run(graph, TINY))
    exact(tg)
    qkv, attention = (next(g for g in tg.grids if g.name == n) for n in ("qkv1", "attention1"))
    needs = [set(tg.deps.row(t).tolist()) for t in range(attention.first, attention.first + attention.count)]
    assert all(0 < len(s) < qkv.count for s in needs), "a head waits for its own columns only"


def boxes(*rows: tuple[int, int, int, int, int]) -> Boxes:
    """Contiguous boxes (task, buffer, mode, offset, bytes)."""
    return from_rows(np.array([[*r, 1, 1, 1, 1, 0, 0, 0, 0] for r in rows], np.int64))


def chain(*rows: tuple[int, int, int, int, int], buffers: int = 1) -> TaskGraph:
    """One task a grid."""
    tasks = max(r[0] for r in rows) + 1
    grids = tuple(Grid(n, "map", f"g{n}", (1,), (1,), n, 1) for n in range(tasks))
    some = tuple(Buffer(n, "workspace", n, 100, "u8", f"b{n}") for n in range(buffers))
    zero = np.zeros(tasks, np.int32)
    return dependencies.run(TaskGraph(grids, some, np.arange(tasks, dtype=np.int32), zero, boxes(*rows)))


def edges(tg: TaskGraph) -> list[list[int]]:
    return [tg.deps.row(t).tolist() for t in range(tg.tasks)]


def test_a_partial_overwrite_keeps_the_older_writer():
    tg = chain((0, 0, WRITE, 0, 100), (1, 0, WRITE, 0, 50), (2, 0, READ, 60, 10), (3, 0, READ, 40, 20))
    assert edges(tg) == [[], [0], [0], [1]]


def test_overlapping_writes_of_one_grid_hide_nothing():
    """As many bytes as the hull has, but with a hole in which the older writer shows."""
    tg = chain(
        (0, 0, WRITE, 0, 100), (1, 0, WRITE, 0, 50), (1, 0, WRITE, 30, 20), (1, 0, WRITE, 70, 30), (2, 0, READ, 55, 5)
    )
    assert edges(tg) == [[], [0], [0]]


def test_write_after_read():
    tg = chain((0, 0, WRITE, 0, 100), (1, 0, READ, 0, 50), (2, 0, READ, 50, 50), (3, 0, WRITE, 0, 100))
    assert edges(tg) == [[], [0], [0], [1, 2]]


def test_readers_do_not_depend_on_each_other():
    assert edges(chain((0, 0, READ, 0, 9), (1, 0, READ, 0, 9), (2, 0, READ, 0, 9))) == [[], [], []]


def test_a_longer_path_between_operators_is_no_proof():
    """g2 depends on g1 and g1 on g0, but not through the tasks that matter: the edge g0 -> g2 must stay."""
    grids = tuple(Grid(n, "map", f"g{n}", (2,), (1,), 2 * n, 2) for n in range(3))
    some = tuple(Buffer(n, "workspace", n, 100, "u8", f"b{n}") for n in range(2))
    rows = [
        (0, 0, WRITE, 0, 50),
        (1, 0, WRITE, 50, 50),
        (2, 0, READ, 0, 50),
        (2, 1, WRITE, 0, 50),
        (3, 1, WRITE, 50, 50),
        (4, 1, READ, 0, 50),
        (4, 0, READ, 0, 50),
        (5, 1, READ, 50, 50),
        (5, 0, READ, 50, 50),
    ]
    tg = TaskGraph(
        grids, some, np.repeat(np.arange(3, dtype=np.int32), 2), np.tile(np.arange(2, dtype=np.int32), 3), boxes(*rows)
    )
    tg = dependencies.run(tg)
    exact(tg)
    assert edges(tg)[4:] == [[2], [1, 3]]


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(seed, monkeypatch):
    cut_small(monkeypatch)
    exact(dependencies.run(decompose.run(random_program(seed), TINY)))


def test_in_place_chain():
    """Readers of every version, and the write that must wait for them."""
    graph = parse("""
graph f(x:f32[8], i:i32[1])
  old:f32[8] = map[i0<8]
      expr: x[i0]
  y:f32[8] = update[i0<4]
      to x at [i0], set (out of bounds: clamp)
      expr: 1.0
  mid:f32[8] = map[i0<8]
      expr: y[i0]
  z:f32[8] = update[i0<1]
      to y at [clamp<7>(i[0])], set (out of bounds: clamp)
      expr: old[3]
  return z, mid
""")
    tg = dependencies.run(decompose.run(graph, TINY))
    exact(tg)
    assert edges(tg) == [[], [0], [1], [2]]


def test_nothing_to_order():
    graph = parse("graph f(x:f32[8])\n  y:f32[8] = map[i0<8]\n      expr: x[i0]\n  return y")
    assert edges(dependencies.run(decompose.run(graph, TINY))) == [[]]
