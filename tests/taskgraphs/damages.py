"""Ways to break a task graph on purpose. They apply to any complete graph, that of a real model included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from jax_mpk.ir.tasks import READ, UPDATE, WRITE, Boxes, Csr, TaskGraph
from tests.taskgraphs.builder import MAX


@dataclass(frozen=True)
class Damage:
    """`fatal`: unsound whatever the graph is; otherwise it depends, and only the oracle knows."""

    name: str
    tg: TaskGraph
    fatal: bool


def damages(tg: TaskGraph, rng: np.random.Generator) -> Iterator[Damage]:
    """Every damage that applies to this graph, each at a random place. The graph must be complete and sound."""
    for i in rng.permutation(len(_DAMAGES)).tolist():
        damage, fatal = _DAMAGES[i]
        broken = damage(tg, rng)
        if broken is not None:
            yield Damage(damage.__name__, broken, fatal)


_DAMAGES: list[tuple[Callable[[TaskGraph, np.random.Generator], TaskGraph | None], bool]] = []


def _damage(fatal: bool) -> Callable:
    def register(f: Callable) -> Callable:
        _DAMAGES.append((f, fatal))
        return f

    return register


def _without(csr: Csr, k: int) -> Csr:
    row = int(csr.row_of()[k])
    start = csr.start.copy()
    start[row + 1 :] -= 1
    return Csr(start, np.delete(csr.data, k))


def _with(csr: Csr, row: int, value: int) -> Csr:
    start = csr.start.copy()
    start[row + 1 :] += 1
    return Csr(start, np.insert(csr.data, csr.start[row + 1], value))


def _has(csr: Csr, row: int, value: int) -> bool:
    return value in csr.row(row)


def _box(tg: TaskGraph, **columns: np.ndarray) -> TaskGraph:
    return replace(tg, boxes=replace(tg.boxes, **columns))


def _set(a: np.ndarray, at: int | tuple[int, int], value: int) -> np.ndarray:
    a = a.copy()
    a[at] = value
    return a


def _rows(tg: TaskGraph, rows: np.ndarray) -> TaskGraph:
    x = tg.boxes
    return replace(tg, boxes=Boxes(*(a[rows] for a in (x.task, x.buffer, x.mode, x.offset, x.run, x.count, x.stride))))


def _some(rng: np.random.Generator, which: np.ndarray) -> int:
    """A random index where `which` holds, -1 if there is none."""
    at = np.flatnonzero(which)
    return int(at[rng.integers(len(at))]) if len(at) else -1


def _fits(tg: TaskGraph, row: int) -> bool:
    x = tg.boxes
    reach = (x.count[row] - 1) * x.stride[row]
    lo = int(x.offset[row] + np.minimum(reach, 0).sum())
    hi = int(x.offset[row] + np.maximum(reach, 0).sum() + x.run[row])
    return 0 <= lo and hi <= tg.buffers[x.buffer[row]].nbytes


@_damage(fatal=False)
def wait_dropped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    if not len(tg.waits.data):
        return None
    return replace(tg, waits=_without(tg.waits, int(rng.integers(len(tg.waits.data)))))


@_damage(fatal=False)
def wait_moved(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task waits for another event instead."""
    if not len(tg.waits.data):
        return None
    k, e = int(rng.integers(len(tg.waits.data))), int(rng.integers(tg.events))
    if _has(tg.waits, int(tg.waits.row_of()[k]), e):
        return None
    return replace(tg, waits=Csr(tg.waits.start, _set(tg.waits.data, k, e)))


@_damage(fatal=True)
def trigger_dropped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    if not len(tg.triggers.data):
        return None
    return replace(tg, triggers=_without(tg.triggers, int(rng.integers(len(tg.triggers.data)))))


@_damage(fatal=False)
def producer_forgotten(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A trigger is dropped and the threshold agrees: the event no longer stands for that task."""
    if not len(tg.triggers.data):
        return None
    k = int(rng.integers(len(tg.triggers.data)))
    e = tg.triggers.data[k]
    return replace(tg, triggers=_without(tg.triggers, k), threshold=_set(tg.threshold, e, tg.threshold[e] - 1))


@_damage(fatal=True)
def trigger_moved(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task triggers another event instead."""
    if tg.events < 2 or not len(tg.triggers.data):
        return None
    k, e = int(rng.integers(len(tg.triggers.data))), int(rng.integers(tg.events))
    if _has(tg.triggers, int(tg.triggers.row_of()[k]), e):
        return None
    return replace(tg, triggers=Csr(tg.triggers.start, _set(tg.triggers.data, k, e)))


@_damage(fatal=False)
def trigger_of_another(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """Another task triggers the event: all counts are right."""
    if not len(tg.triggers.data):
        return None
    k, t = int(rng.integers(len(tg.triggers.data))), int(rng.integers(tg.tasks))
    e = int(tg.triggers.data[k])
    if _has(tg.triggers, t, e) or len(tg.triggers.row(t)) >= MAX:
        return None
    return replace(tg, triggers=_with(_without(tg.triggers, k), t, e))


@_damage(fatal=True)
def threshold_low(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    e = _some(rng, tg.threshold > 0)
    return None if e < 0 else replace(tg, threshold=_set(tg.threshold, e, tg.threshold[e] - 1))


@_damage(fatal=True)
def threshold_high(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    e = _some(rng, tg.threshold > 0)
    return None if e < 0 else replace(tg, threshold=_set(tg.threshold, e, tg.threshold[e] + 1))


@_damage(fatal=True)
def order_swapped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task and a producer that it waits for change places in the linear order."""
    if not len(tg.waits.data):
        return None
    k = int(rng.integers(len(tg.waits.data)))
    t, producers = int(tg.waits.row_of()[k]), tg.triggers.row_of()[tg.triggers.data == tg.waits.data[k]]
    position = np.empty(tg.tasks, np.int64)
    position[tg.order] = np.arange(tg.tasks)
    p = int(producers[rng.integers(len(producers))])
    order = tg.order.copy()
    order[position[t]], order[position[p]] = p, t
    return replace(tg, order=order)


@_damage(fatal=False)
def order_shuffled(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task moves to another place of the linear order, and so on its worker."""
    a, b = rng.integers(0, tg.tasks, 2)
    return replace(tg, order=np.insert(np.delete(tg.order, a), b, tg.order[a]))


@_damage(fatal=False)
def buffers_overlapped(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """The memory plan puts a buffer where another one is."""
    inside = np.array([b.space == "workspace" for b in tg.buffers])
    a, b = _some(rng, inside), _some(rng, inside)
    if a == b or tg.buffers[a].offset + tg.buffers[b].nbytes > tg.workspace:
        return None
    buffers = list(tg.buffers)
    buffers[b] = replace(buffers[b], offset=buffers[a].offset)
    return replace(tg, buffers=tuple(buffers))


@_damage(fatal=False)
def box_widened(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = int(rng.integers(len(tg.boxes)))
    more = int(rng.integers(1, max(2, tg.boxes.run[r])))
    dims = np.flatnonzero(tg.boxes.count[r] > 1)
    if len(dims) and rng.random() < 0.5:
        at = (r, int(dims[rng.integers(len(dims))]))
        out = _box(tg, count=_set(tg.boxes.count, at, tg.boxes.count[at] + 1))
    elif len(dims):  # wider pieces would overlap each other
        return None
    else:
        out = _box(tg, run=_set(tg.boxes.run, r, tg.boxes.run[r] + more))
    return out if _fits(out, r) else None


@_damage(fatal=False)
def box_moved(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = int(rng.integers(len(tg.boxes)))
    by = int(rng.integers(1, 1 + max(1, tg.boxes.run[r]))) * int(rng.choice([-1, 1]))
    out = _box(tg, offset=_set(tg.boxes.offset, r, tg.boxes.offset[r] + by))
    return out if _fits(out, r) else None


@_damage(fatal=False)
def write_narrowed(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = _some(rng, (tg.boxes.mode == WRITE) & (tg.boxes.run > 1))
    return None if r < 0 else _box(tg, run=_set(tg.boxes.run, r, tg.boxes.run[r] - 1))


@_damage(fatal=False)
def write_lost(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = _some(rng, tg.boxes.mode == WRITE)
    return None if r < 0 else _rows(tg, np.delete(np.arange(len(tg.boxes)), r))


@_damage(fatal=False)
def write_repeated(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """Another task writes the same box."""
    x = tg.boxes
    r, t = _some(rng, x.mode == WRITE), int(rng.integers(tg.tasks))
    if r < 0 or t == x.task[r]:
        return None
    task = np.append(x.task, np.int32(t))
    rows = np.argsort(task, kind="stable")
    return _rows(_box(_rows(tg, np.append(np.arange(len(x)), r)), task=task), rows)


@_damage(fatal=False)
def boxes_exchanged(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """Two tasks do each other's work."""
    a, b = rng.integers(0, tg.tasks, 2)
    task = tg.boxes.task.copy()
    task[tg.boxes.task == a], task[tg.boxes.task == b] = b, a
    rows = np.argsort(task, kind="stable")
    return _rows(_box(tg, task=task), rows)


@_damage(fatal=False)
def read_becomes_write(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    free = np.array([b.space in ("workspace", "result") for b in tg.buffers])
    r = _some(rng, (tg.boxes.mode == READ) & free[tg.boxes.buffer])
    return None if r < 0 else _box(tg, mode=_set(tg.boxes.mode, r, int(rng.integers(WRITE, UPDATE + 1))))


@_damage(fatal=False)
def write_becomes_read(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    r = _some(rng, tg.boxes.mode != READ)
    return None if r < 0 else _box(tg, mode=_set(tg.boxes.mode, r, READ))


@_damage(fatal=False)
def other_buffer(tg: TaskGraph, rng: np.random.Generator) -> TaskGraph | None:
    """A task reads another buffer than it says."""
    r, b = _some(rng, tg.boxes.mode == READ), int(rng.integers(len(tg.buffers)))
    if r < 0 or b == tg.boxes.buffer[r]:
        return None
    out = _box(tg, buffer=_set(tg.boxes.buffer, r, b))
    return out if _fits(out, r) else None
