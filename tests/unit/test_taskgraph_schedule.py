"""Events, normalisation, order, placement and memory plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jax_mpk.abi import MAX_TRIGGERS, MAX_WAITS
from jax_mpk.device import CPU, H100, Device
from jax_mpk.ir.boxes import bytes_of, from_rows
from jax_mpk.ir.graph import Graph, itemsize
from jax_mpk.ir.parse import parse
from jax_mpk.ir.tasks import READ, WRITE, Buffer, Csr, Grid, TaskGraph
from jax_mpk.passes import decompose, dependencies, events, hops, linearise, memory, normalise
from jax_mpk.verify import verify
from tests.unit.graphs_by_hand import (
    TINY,
    brute_conflicts,
    closure,
    compile_,
    cut_small,
    decoder,
    dense,
    event_order,
    matmul,
    random_program,
    task_bytes,
)
from tests.unit.test_taskgraph_decompose import everything
from tests.unit.test_taskgraph_dependencies import boxes as contiguous
from tests.unit.test_taskgraph_dependencies import chain, random_graph

LIMITS = [(4, 4), (2, 2), (1, 2), (2, 1)]


def layered(seed: int, width: int, layers: int, density: float) -> TaskGraph:
    """A task graph without boxes whose dependencies are random: more forks and joins than any model has."""
    rng = np.random.default_rng(seed)
    grids = tuple(Grid(n, "map", f"g{n}", (width,), (1,), n * width, width) for n in range(layers))
    pairs = [(t, int(s)) for t in range(width, width * layers)
             for s in np.flatnonzero(rng.random((t // width) * width) < density / (t // width))]  # fmt: skip
    row, col = (np.array(x, np.int64) for x in zip(*pairs, strict=True))
    tasks = width * layers
    grid_of = np.repeat(np.arange(layers, dtype=np.int32), width)
    none = from_rows(np.zeros((0, 13), np.int64))
    index = np.tile(np.arange(width, dtype=np.int32), layers)
    return TaskGraph(grids, (), grid_of, index, none, Csr.from_pairs(row, col, tasks))


def consistent(tg: TaskGraph) -> None:
    """Thresholds are the producers, every event has waiters, order and levels are topological."""
    assert tg.waits.rows == tg.triggers.rows == tg.tasks
    assert (np.bincount(tg.triggers.data, minlength=tg.events) == tg.threshold).all()
    assert (np.bincount(tg.waits.data, minlength=tg.events) > 0).all() and (tg.threshold > 0).all()
    order = event_order(tg)
    assert not order.diagonal().any(), "a cycle"
    level = hops.levels(tg)
    later, earlier = np.nonzero(order)
    assert (level[later] > level[earlier]).all()


@pytest.mark.parametrize("seed", range(5))
def test_one_event_per_set_of_producers(seed):
    tg = events.run(layered(seed, 6, 5, 1.5))
    consistent(tg)
    assert (closure(dense(tg.deps, tg.tasks)) == event_order(tg)).all()
    sets = {tuple(tg.deps.row(t).tolist()) for t in range(tg.tasks)} - {()}
    assert tg.events == len(sets)
    assert (np.diff(tg.waits.start) == (np.diff(tg.deps.start) > 0)).all()


def test_sets_with_equal_hashes_stay_apart(monkeypatch):
    tg = layered(1, 6, 5, 1.5)
    want = events.run(tg)
    monkeypatch.setattr(events, "_mix", np.ones_like)
    got = events.run(tg)
    assert all((getattr(got, f).data == getattr(want, f).data).all() for f in ("waits", "triggers"))
    assert (got.threshold == want.threshold).all()


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("density", [0.8, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_normalised_graphs_keep_the_order(seed, density, limits, monkeypatch):
    monkeypatch.setattr(normalise, "MAX_WAITS", limits[0])
    monkeypatch.setattr(normalise, "MAX_TRIGGERS", limits[1])
    before = events.run(layered(seed, 7, 5, density))
    before = replace(before, units=tuple(range(len(before.grids))))
    tg = normalise.run(before)
    consistent(tg)
    units = [
        None if g.kind == "nop" else n
        for n, g in zip(np.cumsum([g.kind != "nop" for g in tg.grids]) - 1, tg.grids, strict=True)
    ]
    assert list(tg.units) == units, "what a grid does stays with it"
    assert np.diff(tg.waits.start).max() <= limits[0] and np.diff(tg.triggers.start).max() <= limits[1]
    real = np.flatnonzero([tg.grids[g].kind != "nop" for g in tg.grid_of])
    assert len(real) == before.tasks
    assert (event_order(tg)[np.ix_(real, real)] >= closure(dense(before.deps, before.tasks))).all()
    assert [g.first for g in tg.grids] == np.cumsum([0, *(g.count for g in tg.grids)])[:-1].tolist()
    assert all((tg.grid_of[g.first : g.first + g.count] == n).all() for n, g in enumerate(tg.grids))
    assert (closure(dense(tg.deps, tg.tasks)) <= event_order(tg)).all(), "dummies' dependencies are honoured too"


def by_hand(sizes: list[int], needs: dict[int, list[int]]) -> TaskGraph:
    """Grids of these sizes, without boxes, and these dependencies."""
    first = np.cumsum([0, *sizes])
    grids = tuple(
        Grid(n, "map", f"g{n}", (c,), (1,), int(f), c) for n, (c, f) in enumerate(zip(sizes, first, strict=False))
    )
    row, col = (np.array(x) for x in zip(*((t, s) for t, row in needs.items() for s in row), strict=True))
    grid_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    index = (np.arange(len(grid_of)) - first[grid_of]).astype(np.int32)
    none = from_rows(np.zeros((0, 13), np.int64))
    return TaskGraph(grids, (), grid_of, index, none, Csr.from_pairs(row, col, len(grid_of)))


def test_each_way_to_normalise_is_used(monkeypatch):
    used = set()
    for name in ("_split", "_merge", "_forward"):
        step = getattr(normalise, name)
        monkeypatch.setattr(normalise, name, lambda *a, step=step, name=name: used.add(name) or step(*a))
    tg = events.run(by_hand([8, *[1] * 7], {8 + n: [0, 1 + n] for n in range(7)}))
    assert np.diff(tg.triggers.start).max() == 7 > MAX_TRIGGERS
    tg = normalise.run(tg)
    consistent(tg)
    assert used == {"_split", "_merge", "_forward"} and any(g.kind == "nop" for g in tg.grids)
    assert all(g.op == -1 for g in tg.grids if g.kind == "nop")


def test_a_small_fork_needs_no_dummy():
    """One producer of many grids with different sets: splitting by grid is enough and loses nothing."""
    tg = events.run(by_hand([1, 8, 8], {t: [0, t - 8] for t in range(9, 17)}))
    assert np.diff(tg.triggers.start).max() == 8
    tg = normalise.run(tg)
    assert tg.tasks == 17 and np.diff(tg.waits.start).max() == 2 and np.diff(tg.triggers.start).max() == 1
    assert (event_order(tg) == closure(dense(tg.deps, 17))).all()


@pytest.mark.parametrize("seed", range(8))
def test_tasks_of_one_grid_that_collide_stay_in_order(seed, monkeypatch):
    """Producers and consumers of an event in one grid: events may only be merged where that makes no cycle."""
    monkeypatch.setattr(normalise, "MAX_TRIGGERS", 1)
    before = events.run(dependencies.run(random_graph(seed, 6, 6, 0.6, 9)))
    assert (before.grid_of[before.deps.row_of()] == before.grid_of[before.deps.data]).any()
    tg = normalise.run(before)
    consistent(tg)
    real = np.flatnonzero([tg.grids[g].kind != "nop" for g in tg.grid_of])
    assert (event_order(tg)[np.ix_(real, real)] >= closure(dense(before.deps, before.tasks))).all()


def test_subsets():
    rng = np.random.default_rng(0)
    rows = sorted({tuple(sorted(set(rng.integers(0, 6, rng.integers(1, 6)).tolist()))) for _ in range(60)})
    sets = Csr(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int32))
    a, b = (x.ravel() for x in np.indices((len(rows), len(rows))))
    want = [set(rows[i]) < set(rows[j]) for i, j in zip(a, b, strict=True)]
    assert normalise._inside(sets, a, b).tolist() == want


def test_boxes_follow_their_tasks_when_dummies_come_in(monkeypatch):
    monkeypatch.setattr(normalise, "MAX_TRIGGERS", 1)
    before = events.run(dependencies.run(random_graph(0, 20, 6, 0.6)))
    tg = normalise.run(before)
    assert tg.tasks > before.tasks
    real = np.flatnonzero([tg.grids[g].kind != "nop" for g in tg.grid_of])
    assert (real[before.boxes.task] == tg.boxes.task).all()
    assert [tg.grids[tg.grid_of[t]].name for t in real] == [before.grids[g].name for g in before.grid_of]
    assert (tg.index[real] == before.index).all()


@pytest.mark.parametrize("seed", range(5))
def test_order(seed):
    tg = linearise.run(normalise.run(events.run(layered(seed, 9, 5, 1.2))))
    place = np.empty(tg.tasks, np.int64)
    place[tg.order] = np.arange(tg.tasks)
    later, earlier = np.nonzero(event_order(tg))
    assert (place[later] > place[earlier]).all()
    assert (np.diff(hops.levels(tg)[tg.order]) >= 0).all(), "breadth first"
    once = events.run(layered(seed, 9, 5, 1.2))
    tg = linearise.run(once)
    place[tg.order] = np.arange(tg.tasks)
    for e in range(tg.events):
        at = np.sort(place[tg.waits.row_of()[tg.waits.data == e]])
        assert (np.diff(at) == 1).all(), "the tasks of an event are contiguous"


def test_a_cycle_is_found():
    tg = events.run(chain((0, 0, WRITE, 0, 9), (1, 0, READ, 0, 9)))
    loop = replace(tg, threshold=np.array([1, 1], np.int32),
                   waits=Csr.from_pairs(np.array([0, 1]), np.array([1, 0]), 2),
                   triggers=Csr.from_pairs(np.array([0, 1]), np.array([0, 1]), 2))  # fmt: skip
    with pytest.raises(ValueError, match="cycle"):
        linearise.run(loop)


# ------------------------------------------------------------------------------------------------------------ placement


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_get_equal_bytes(workers):
    graph = decoder(layers=6, hidden=128, heads=8, kv=4, head=16, ffn=256, keys=32, vocab=512)
    target = Device("cpu", 2, 8, 16)
    tg = compile_(graph, target, workers)
    assert tg.workers == workers and tg.worker.min() >= 0 and tg.worker.max() < workers
    reads = np.where(tg.boxes.mode == READ, bytes_of(tg.boxes), 0)
    cost = np.bincount(tg.boxes.task, reads, tg.tasks)
    cost[tg.grid_of == 0] = 0  # the gather
    load = np.bincount(tg.worker, cost, workers)
    assert load.max() - load.min() <= 2 * cost.max()
    for n, g in enumerate(tg.grids):
        if g.count >= workers and g.kind == "contract":
            mine = np.bincount(tg.worker[tg.grid_of == n], cost[tg.grid_of == n], workers)
            assert mine.max() - mine.min() <= 3 * cost[tg.grid_of == n].max(), "every operator is spread"


def test_remainders_rotate():
    """Five tasks an operator on two workers: who got three gets two next time."""
    ops = [matmul(f"x{n + 1}", (1, 320, 320), f"x{n}[i0, k0]", f"w{n}") for n in range(4)]
    weights = ", ".join(f"w{n}:f32[320,320]" for n in range(4))
    graph = parse(f"graph f(x0:f32[1,320], {weights})\n{''.join(ops)}  return x4")
    tg = compile_(graph, Device("cpu", 2, 64, 5))
    first = [int((tg.worker[tg.grid_of == n] == 0).sum()) for n in range(4)]
    assert sorted(first[:2]) == [2, 3] and first[:2] == first[2:]


def copies(name: str, steps: int, n: int) -> str:
    """Maps from `name`0[n] to `name`1 and so on."""
    return "".join(f"  {name}{j + 1}:f32[{n}] = map[i0<{n}]\n      expr: {name}{j}[i0]\n" for j in range(steps))


def test_a_lone_task_follows_its_producer():
    graph = parse(f"graph f(x0:f32[8])\n{copies('x', 3, 8)}  return x3")
    tg = compile_(graph, CPU, 2)
    assert len(set(tg.worker.tolist())) == 2, "work is shared"
    assert compile_(graph, CPU, 1).worker.tolist() == [0, 0, 0]


STREAMING = Device("cuda", workers=4, columns=8, tasks=8, frame=512, inner=32, ring=4)


def frame_bytes(tg: TaskGraph, e: int) -> set[int]:
    """The bytes that the frames of stream entry `e` bring, as the copy engine would: out-of-range parts are dropped."""
    m = tg.maps[tg.streams.map[e]]
    size, out = m.strides[0], set()
    for f in range(tg.streams.frames[e]):
        start = tg.streams.start[e] + f * tg.streams.step[e]
        for j in np.ndindex(*m.box):
            at = [int(s) + i for s, i in zip(start[: len(m.box)], j, strict=True)]
            if all(0 <= i < n for i, n in zip(at, m.dims, strict=True)):
                byte = m.offset + sum(i * s for i, s in zip(at, m.strides, strict=True))
                out |= set(range(byte, byte + size))
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k,n", [(256, 192), (384, 128), (128, 320)])
@pytest.mark.parametrize("weights", [1, 2])
def test_streams_bring_what_a_task_reads(transposed, k, n, weights):
    w = ["w0", "w1"][:weights]
    shape = f"bf16[{n},{k}]" if transposed else f"bf16[{k},{n}]"
    last = f"acc{weights - 1}"
    mm = matmul("y", (3, k, n), "x[i0, k0]", *w, transposed=transposed, epilogue=last, dtype="bf16")
    graph = parse(f"graph f(x:bf16[3,{k}], {', '.join(f'{i}:{shape}' for i in w)})\n{mm}  return y")
    tg = compile_(graph, H100)
    assert len(tg.maps) == weights
    for m in tg.maps:
        assert m.strides[0] == itemsize(m.dtype) and np.prod(m.box) * m.strides[0] == H100.frame
        assert m.box[0] * m.strides[0] == H100.inner
    buffers = [decompose.buffer_of(graph)[i] for i in graph.args[1:]]
    touched, _ = task_bytes(tg)
    for t in range(tg.tasks):
        for buffer in buffers:
            mine = [e for e in range(len(tg.streams.task))
                    if tg.streams.task[e] == t and tg.maps[tg.streams.map[e]].buffer == buffer]  # fmt: skip
            assert {x for i, x in touched[t] if i == buffer} <= set().union(*(frame_bytes(tg, e) for e in mine))
    place = np.argsort(tg.order)
    assert (np.diff(place[tg.streams.task]) >= 0).all()


def test_only_read_only_weights_stream():
    graph = parse(f"""
graph f(x:f32[2,32], w:f32[32,32])
  ones:f32[32,32] = update[i0<32, i1<32]
      to w at [i0, i1], set (out of bounds: clamp)
      expr: 1.0
{matmul("y", (2, 32, 32), "x[i0, k0]", "ones")}
  return y, ones
""")
    tg = compile_(graph, STREAMING)
    assert tg.maps == () and len(tg.streams.task) == 0
    assert compile_(decoder(), CPU).streams is None, "a target without a ring does not stream"


# --------------------------------------------------------------------------------------------------------------- memory


def plan_is_sound(tg: TaskGraph) -> int:
    """Whatever the workers, no byte of the workspace holds two buffers at once. Returns how many pairs share bytes."""
    before = closure(dense(tg.deps, tg.tasks))
    spaces = [b for b in tg.buffers if b.space == "workspace"]
    users: dict[int, dict[int, set[int]]] = {b.id: {} for b in spaces}  # buffer -> byte of the workspace -> tasks
    for t, cells in enumerate(task_bytes(tg)[0]):
        for b, x in cells:
            if b in users:
                users[b].setdefault(tg.buffers[b].offset + x, set()).add(t)
    shared = 0
    for i, a in enumerate(spaces):
        assert a.offset >= 0 and a.offset % 64 == 0 and a.offset + a.nbytes <= tg.workspace
        for b in spaces[:i]:
            common = users[a.id].keys() & users[b.id].keys()
            shared += bool(common)
            later = [all(before[q, p] for x in common for p in users[m][x] for q in users[n][x])
                     for m, n in ((a.id, b.id), (b.id, a.id))]  # fmt: skip
            assert any(later), f"{a.name} and {b.name}"
    return shared


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_memory_of_random_boxes(seed, most):
    plan_is_sound(memory.run(dependencies.run(random_graph(seed, 40, 20, 0.3, most))))


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed, monkeypatch):
    cut_small(monkeypatch)
    tg = compile_(random_program(seed), TINY, 3)
    consistent(tg)
    assert (event_order(tg) >= closure(brute_conflicts(tg))).all()
    shared = plan_is_sound(tg)
    assert (tg.workspace < sum(b.nbytes for b in tg.buffers if b.space == "workspace")) == (shared > 0)
    assert shared > 0
    verify(tg, target=TINY)


@pytest.mark.parametrize("batch", [1, 2])
def test_layers_reuse_the_workspace(batch):
    few, many = (compile_(decoder(layers=n, batch=batch), TINY) for n in (3, 8))
    assert plan_is_sound(many) > 0
    assert few.workspace == many.workspace, "the peak does not grow with the layers"


def test_no_reuse_without_an_order():
    """Two chains that may run side by side cannot share, though they never overlap in program order."""
    tg = compile_(
        parse(f"graph f(x0:f32[64], y0:f32[64])\n{copies('x', 3, 64)}{copies('y', 3, 64)}  return x3, y3"), CPU
    )
    assert plan_is_sound(tg) == 0 and tg.workspace == 4 * 256


def test_rows_that_never_meet_share_row_by_row(monkeypatch):
    """Four independent rows: no operator is ordered as a whole after another, yet the workspace stays small."""
    cut_small(monkeypatch)
    sums = (f"x{n}:f32[4,64] = map[i0<4, i1<64] expr: (x{n - 2}[i0, i1] + x{n - 1}[i0, i1])\n" for n in range(2, 14))
    graph = parse(f"graph f(x0:f32[4,64], x1:f32[4,64])\n{''.join(sums)} return x13")
    tg = compile_(graph, TINY, 3)
    assert tg.grids[0].count == 4 and len(tg.deps.data) < 12 * 4 * 3
    assert plan_is_sound(tg) > 0
    assert tg.workspace == 3 * 1024, "of eleven buffers"
    verify(tg, target=TINY)
    monkeypatch.setattr(memory, "SLACK", 1000)
    assert compile_(graph, TINY).workspace == 11 * 1024


def test_a_buffer_written_in_part_hides_nothing(monkeypatch):
    """b lies where a was, but only over its first row: c, which follows b, must not lie over a's second row."""
    monkeypatch.setattr(memory, "SLACK", 0)
    row, both = (0, 64), (0, 128)
    boxes = [(0, 0, WRITE, *row), (1, 0, WRITE, 64, 64), (2, 0, READ, *row), (2, 3, WRITE, *row), (3, 3, READ, *row),
             (3, 1, WRITE, *row), (4, 1, READ, *row), (4, 4, WRITE, *row), (5, 4, READ, *row), (5, 2, WRITE, *both),
             (6, 0, READ, 64, 64)]  # fmt: skip
    first = [(0, 2), *((n, 1) for n in range(2, 7))]
    grids = tuple(Grid(n, "map", f"g{n}", (c,), (1,), f, c) for n, (f, c) in enumerate(first))
    some = tuple(Buffer(n, "workspace", n, 64 if n > 2 else 128, "u8", "abcde"[n]) for n in range(5))
    grid_of = np.array([0, 0, 1, 2, 3, 4, 5], np.int32)
    tg = TaskGraph(grids, some, grid_of, np.array([0, 1, 0, 0, 0, 0, 0], np.int32), contiguous(*boxes))
    tg = memory.run(dependencies.run(tg))
    plan_is_sound(tg)
    assert memory._Rows(tg).ordered(tg.buffers[0], tg.buffers[1])
    assert not memory._Rows(tg).ordered(tg.buffers[1], tg.buffers[2])


def test_constants_have_offsets():
    text = """
graph f()
  const a:f32[5]
  const b:f32[40]
  x:f32[5] = map[i0<5]
      expr: (a[i0] + b[i0])
  return x
"""
    tg = compile_(parse(text, {"a": np.ones(5, np.float32), "b": np.ones(40, np.float32)}), CPU)
    assert [b.offset for b in tg.buffers if b.space == "const"] == [0, 64]


def test_precedence_is_what_the_dependencies_prove():
    for seed in range(6):
        tg = dependencies.run(random_graph(seed, 20, 3, 0.4))
        before = closure(dense(tg.deps, tg.tasks))
        for y, bits in enumerate(memory.precedence(tg)):
            for x in range(len(tg.grids)):
                if bits >> x & 1:
                    assert before[np.ix_(tg.grid_of == y, tg.grid_of == x)].all()


# ----------------------------------------------------------------------------------------------------------- all passes


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    "graph", [decoder(layers=2), decoder(layers=2, batch=3), everything()], ids=["one", "batch", "kinds"]
)
@pytest.mark.parametrize("target", [TINY, CPU, STREAMING], ids=["tiny", "cpu", "ring"])
def test_programs_verify(graph: Graph, target: Device, workers: int, monkeypatch):
    cut_small(monkeypatch)
    tg = compile_(graph, target, workers)
    consistent(tg)
    assert verify(tg, target=target).tasks == tg.tasks


def test_hops():
    assert hops.hops(decoder(layers=3)) == tuple(range(3 * 5 + 2))
    tg = compile_(decoder(layers=3), TINY)
    assert hops.critical_path(tg) == 3 * 5 + 2
    fork = """
graph f(x:f32[4])
  y:f32[4] = map[i0<4] expr: x[i0]
  z:f32[4] = map[i0<4] expr: x[i0]
  w:f32[4] = map[i0<4] expr: (y[i0] + z[i0])
  return w
"""
    assert hops.hops(parse(fork)) == (0, 0, 1)


def test_equal_layers_cost_one_layer(monkeypatch):
    """Box expansion and overlap run once per distinct pair of grids, however many layers there are."""
    calls = []
    for module, name in ((decompose, "expand"), (dependencies, "overlap")):
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=f: calls.append(0) or f(*a))

    def work(layers: int) -> int:
        calls.clear()
        compile_(decoder(layers=layers), TINY)
        return len(calls)

    assert work(12) == work(3) > 0


def test_thirty_thousand_tasks():
    """A model of real size: five hops a layer, few events, and a workspace of one layer."""
    graph = decoder(layers=36, hidden=4096, heads=32, kv=8, head=128, ffn=12288, keys=1024, vocab=151936, dtype="bf16")
    tg = compile_(graph, Device("cuda", workers=132, columns=32, tasks=264, ring=12))
    assert tg.tasks > 20000
    assert hops.critical_path(tg) == 36 * 5 + 2
    assert tg.events <= 36 * (8 + 4) + 2
    assert tg.workspace < 1 << 20
    assert not any(g.kind == "nop" for g in tg.grids)
    assert MAX_WAITS >= np.diff(tg.waits.start).max() == 1 and READ in tg.boxes.mode
