"""Graphs built by hand for the tests of the task-graph passes, and brute-force oracles on single bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_mpk.device import CPU, Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, coord_axis, coord_const
from jax_mpk.ir.graph import (
    APPEND_AXIS,
    HEAD_AXIS,
    KEY_AXIS,
    Append,
    Attention,
    Contract,
    Graph,
    Map,
    Op,
    Update,
    Value,
    check,
    compute_dtype,
)
from jax_mpk.ir.tasks import READ, Boxes, Csr, TaskGraph
from jax_mpk.kinds import contract, rows, sort
from jax_mpk.passes import bodies, decompose, dependencies, events, linearise, memory, normalise, placement


def cut_small(monkeypatch: Any, cost: int = 1, macs: int = 1) -> None:
    """Cuts operators into tasks however small they are."""
    for module in (rows, sort):
        monkeypatch.setattr(module, "MIN_COST", cost)
    monkeypatch.setattr(contract, "MIN_MACS", macs)


TINY = Device("cpu", workers=2, columns=4, tasks=4)


def compile_(graph: Graph, target: Device = CPU, workers: int | None = None) -> TaskGraph:
    """All the passes."""
    tg = decompose.run(graph, target)
    tg = bodies.run(tg, graph, target) if target.gpu else tg
    tg = normalise.run(events.run(dependencies.run(tg)))
    return memory.run(placement.run(linearise.run(tg), graph, target, workers))


@dataclass
class Builder:
    """Values and operators, appended in program order."""

    values: dict[int, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    args: list[int] = field(default_factory=list)

    def value(self, shape: tuple[int, ...], dtype: str = "f32", role: str = "temp", name: str = "") -> int:
        i = len(self.values)
        index = len(self.args) if role == "arg" else -1
        data = np.zeros(shape, np.float32) if role == "const" else None
        self.values[i] = Value(i, shape, dtype, role, index, data, name)
        return i

    def arg(self, *shape: int, dtype: str = "f32", name: str = "") -> int:
        i = self.value(shape, dtype, "arg", name)
        self.args.append(i)
        return i

    def load(self, v: int, *coords: Coord | int) -> E.Expr:
        at = tuple(coord_const(c) if isinstance(c, int) else c for c in coords)
        return E.load(v, at, compute_dtype(self.values[v].dtype))

    def own(self, v: int) -> tuple[Coord, ...]:
        """The identity coordinates of `v`."""
        return tuple(coord_axis(a, n) for a, n in enumerate(self.values[v].shape))

    def map(self, shape: tuple[int, ...], expr: E.Expr, dtype: str = "f32", name: str = "") -> int:
        out = self.value(shape, dtype, name=name)
        self.ops.append(Map(out, shape, expr=expr))
        return out

    def update(self, target: int, window: tuple[int, ...], coords: tuple[Coord, ...], expr: E.Expr,
               mode: str = "set") -> int:  # fmt: skip
        v = self.values[target]
        out = self.value(v.shape, v.dtype)
        axes = tuple(range(len(window)))
        self.ops.append(Update(out, window, append=Append(target, out, window, axes, expr, coords, mode)))
        return out

    def matmul(self, x: int, w: int, transposed: bool = False, weights: int = 1, name: str = "",
               lhs: E.Expr | None = None, epilogue: E.Expr | None = None) -> int:  # fmt: skip
        """x[m, k] @ w[k, n] (or w[n, k]), the product of `weights` such products."""
        m, k = self.values[x].shape
        n = self.values[w].shape[0 if transposed else 1]
        kc, nc = coord_axis(E.CORE_AXIS, k), coord_axis(1, n)
        rhs = tuple(self.load(w + j, *((nc, kc) if transposed else (kc, nc))) for j in range(weights))
        out = self.value((m, n), self.values[x].dtype, name=name)
        lhs = self.load(x, coord_axis(0, m), kc) if lhs is None else lhs
        epilogue = E.acc(0, (0, 1)) if epilogue is None else epilogue
        self.ops.append(Contract(out, (m, n), lhs=lhs, rhs=rhs, k=((E.CORE_AXIS, k),), epilogue=epilogue))
        return out

    def graph(self, *results: int) -> Graph:
        return check(Graph(self.values, tuple(self.ops), tuple(self.args), results))


def dynamic(b: Builder, v: int, limit: int, *terms: Coord) -> Coord:
    """A coordinate `v[0] + terms` known at run time."""
    return Coord(0, tuple(t for c in terms for t in c.terms), b.load(v, 0), limit)


def decoder(layers: int = 2, batch: int = 1, hidden: int = 32, heads: int = 4, kv: int = 2, head: int = 8,
            ffn: int = 64, keys: int = 16, vocab: int = 96, dtype: str = "f32") -> Graph:  # fmt: skip
    """A decode step with the five operators a layer that fusion aims at, caches updated in place."""
    b = Builder()
    token, pos = b.arg(batch, dtype="i32"), b.arg(1, dtype="i32")
    table = b.arg(vocab, hidden, dtype=dtype)
    caches, weights = [], []
    group, width = heads // kv, (heads + 2 * kv) * head
    for n in range(layers):
        caches.append([b.arg(batch, keys, kv, head, dtype=dtype, name=f"{c}{n}") for c in "kv"])
        shapes = ((hidden, width), (heads * head, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden))
        weights.append([b.arg(*s, dtype=dtype) for s in shapes])
    row = Coord(0, (), b.load(token, coord_axis(0, batch)), vocab - 1)
    x = b.map((batch, hidden), b.load(table, row, coord_axis(1, hidden)), dtype, name="embed")
    out_caches = []
    for n in range(layers):
        wqkv, wo, wg, wu, wd = weights[n]
        assert wu == wg + 1
        m, r = coord_axis(0, batch), coord_axis(E.REDUCE_AXIS, hidden)

        def norm(x: int, m: Coord = m, r: Coord = r) -> E.Expr:
            square = b.load(x, m, r)
            scale = E.reduce("sum", E.binary("mul", square, square), (E.REDUCE_AXIS,), (hidden,))
            return E.binary("mul", b.load(x, m, coord_axis(E.CORE_AXIS, hidden)), E.unary("rsqrt", scale))

        def add(x: int, m: Coord = m) -> E.Expr:
            return E.binary("add", E.acc(0, (0, 1)), b.load(x, m, coord_axis(1, hidden)))

        qkv = b.matmul(x, wqkv, lhs=norm(x), name=f"qkv{n}")
        ax = {a: coord_axis(a, e) for a, e in ((0, batch), (1, kv), (2, group), (3, head))}
        d, s = coord_axis(HEAD_AXIS, head), coord_axis(KEY_AXIS, keys)
        new, appends = [], []
        for c, at in zip(caches[n], (heads * head, (heads + kv) * head), strict=True):
            o = b.value(b.values[c].shape, dtype)
            new.append(o)
            col = E.coord_add(E.coord_add(E.coord_scale(ax[1], head), coord_axis(APPEND_AXIS, head)), coord_const(at))
            where = (ax[0], dynamic(b, pos, keys - 1), ax[1], coord_axis(APPEND_AXIS, head))
            appends.append(Append(c, o, (batch, kv, head), (0, 1, APPEND_AXIS), b.load(qkv, ax[0], col), where))
        q = E.coord_add(E.coord_add(E.coord_scale(ax[1], group * head), E.coord_scale(ax[2], head)), d)
        out = b.value((batch, heads * head), dtype, name=f"attention{n}")
        column = E.coord_add(E.coord_add(E.coord_scale(ax[1], group * head), E.coord_scale(ax[2], head)), ax[3])
        b.ops.append(
            Attention(
                out,
                (batch, kv, group, head),
                store=(ax[0], column),
                batch=(0, 1),
                rows=(2,),
                column=3,
                keys=keys,
                head=head,
                q=b.load(qkv, ax[0], q),
                k=b.load(new[0], ax[0], s, ax[1], d),
                v=b.load(new[1], ax[0], s, ax[1], ax[3]),
                score=E.acc(0, (0, 1, 2, KEY_AXIS)),
                prob=E.acc(0, (0, 1, 2, KEY_AXIS)),
                epilogue=E.acc(0, (0, 1, 2, 3)),
                limit=E.binary("add", b.load(pos, 0), E.const(1, "i32")),
                appends=tuple(appends),
            )
        )
        out_caches += new
        x = b.matmul(out, wo, name=f"o{n}", epilogue=add(x))
        h = b.matmul(x, wg, weights=2, lhs=norm(x), name=f"gate_up{n}",
                     epilogue=E.binary("mul", E.acc(0, (0, 1)), E.acc(1, (0, 1))))  # fmt: skip
        x = b.matmul(h, wd, name=f"down{n}", epilogue=add(x))
    logits = b.matmul(x, table, transposed=True, name="logits")
    return b.graph(logits, *out_caches)


def random_program(seed: int, ops: int = 16) -> Graph:
    """Maps, row reductions, contractions and in-place updates over recent values of shape [4, 8]."""
    rng = np.random.default_rng(seed)
    b = Builder()
    recent, state = [b.arg(4, 8) for _ in range(2)], b.arg(4, 8)
    i, j = coord_axis(0, 4), coord_axis(1, 8)
    for _ in range(ops):
        x, y = (int(v) for v in rng.choice(recent[-3:], 2))
        kind = rng.integers(5)
        if kind == 0:
            x = b.map(
                (4, 8),
                E.binary("add", b.load(x, i, j), b.load(y, i, E.coord_add(coord_const(7), E.coord_scale(j, -1)))),
            )
        elif kind == 1:
            row = E.reduce("sum", b.load(x, i, coord_axis(E.REDUCE_AXIS, 8)), (E.REDUCE_AXIS,), (8,))
            x = b.map((4, 8), E.binary("mul", row, b.load(y, i, j)))
        elif kind == 4:
            state = b.update(state, (2, 8), (E.coord_add(coord_axis(0, 2), coord_const(int(rng.integers(3)))), j),
                             b.load(x, coord_axis(0, 2), j))  # fmt: skip
            x = b.map((4, 8), b.load(state, i, j))
        else:
            x = b.matmul(x, b.arg(8, 8), bool(rng.integers(2)))
        recent.append(x)
    return b.graph(recent[-1], state)


# -------------------------------------------------------------------------------------------------------------- oracles


def box_bytes(b: Boxes, r: int) -> set[int]:
    """The bytes of one box."""
    out = set()
    for j in itertools.product(*(range(int(c)) for c in b.count[r])):
        at = int(b.offset[r]) + sum(i * int(s) for i, s in zip(j, b.stride[r], strict=True))
        out |= set(range(at, at + int(b.run[r])))
    return out


def task_bytes(tg: TaskGraph) -> tuple[list[set[tuple[int, int]]], list[set[tuple[int, int]]]]:
    """Per task, the (buffer, byte) that it touches, and those that it writes."""
    touched: list[set[tuple[int, int]]] = [set() for _ in range(tg.tasks)]
    written: list[set[tuple[int, int]]] = [set() for _ in range(tg.tasks)]
    for r in range(len(tg.boxes)):
        cells = {(int(tg.boxes.buffer[r]), x) for x in box_bytes(tg.boxes, r)}
        touched[tg.boxes.task[r]] |= cells
        if tg.boxes.mode[r] != READ:
            written[tg.boxes.task[r]] |= cells
    return touched, written


def brute_conflicts(tg: TaskGraph) -> np.ndarray:
    """[later, earlier]: whether two tasks touch a byte that one of them writes."""
    touched, written = task_bytes(tg)
    m = np.zeros((tg.tasks, tg.tasks), bool)
    for i, j in itertools.combinations(range(tg.tasks), 2):
        m[j, i] = bool(touched[i] & written[j] or written[i] & touched[j])
    return m


def closure(m: np.ndarray) -> np.ndarray:
    """The transitive closure of a boolean matrix."""
    while True:
        more = m | ((m.astype(np.float32) @ m.astype(np.float32)) > 0)
        if (more == m).all():
            return m
        m = more


def dense(c: Csr, columns: int) -> np.ndarray:
    m = np.zeros((c.rows, columns), bool)
    m[c.row_of(), c.data] = True
    return m


def event_order(tg: TaskGraph) -> np.ndarray:
    """[later, earlier]: the order that the events enforce, as a closure."""
    assert tg.waits is not None and tg.triggers is not None
    return closure((dense(tg.waits, tg.events).astype(np.int64) @ dense(tg.triggers, tg.events).T) > 0)
