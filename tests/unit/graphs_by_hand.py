"""Graphs written by hand for the tests of the task-graph passes, and brute-force oracles on single bytes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from jax_mpk.device import CPU, Device
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.parse import parse
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


def matmul(out: str, size: tuple[int, int, int], lhs: str, *weights: str, epilogue: str = "acc0", transposed: bool = False,
           dtype: str = "f32") -> str:  # fmt: skip
    """The text of a contraction: `lhs`, of `size` (m, k, n), by weights[k, n], or weights[n, k]."""
    (m, k, n), at = size, "i1, k0" if transposed else "k0, i1"
    rhs = "".join(f"      rhs{j}: {w}[{at}]\n" for j, w in enumerate(weights))
    return (f"  {out}:{dtype}[{m},{n}] = contract[i0<{m}, i1<{n}]\n      k: k0<{k}\n      lhs: {lhs}\n{rhs}"
            f"      epilogue: {epilogue}\n")  # fmt: skip


def decoder(layers: int = 2, batch: int = 1, hidden: int = 32, heads: int = 4, kv: int = 2, head: int = 8,
            ffn: int = 64, keys: int = 16, vocab: int = 96, dtype: str = "f32") -> Graph:  # fmt: skip
    """A decode step with the five operators a layer that fusion aims at, caches updated in place."""
    group, width, wide = heads // kv, (heads + 2 * kv) * head, heads * head
    cache = f"{dtype}[{batch},{keys},{kv},{head}]"
    args, results = [f"token:i32[{batch}]", "pos:i32[1]", f"table:{dtype}[{vocab},{hidden}]"], ["logits"]

    def norm(x: str) -> str:
        return f"({x}[i0, k0] * rsqrt(sum[r0<{hidden}](({x}[i0, r0] * {x}[i0, r0]))))"

    def append(name: str, n: int, at: int) -> str:
        return f"""
      append new_{name}:{cache} over i0<{batch}, i1<{kv}, k8<{head} to {name} at
          [i0, clamp<{keys - 1}>(pos[0]), i1, k8], set (out of bounds: clamp)
      append{n}.expr: {qkv}[i0, {head}*i1+k8+{at}]"""

    x, ops = "embed", [f"""
  embed:{dtype}[{batch},{hidden}] = map[i0<{batch}, i1<{hidden}]
      expr: table[clamp<{vocab - 1}>(token[i0]), i1]
"""]  # fmt: skip
    for n in range(layers):
        qkv, keys_, values, wqkv, wo, wg, wu, wd = (f"{name}{n}" for name in "qkv keys values wqkv wo wg wu wd".split())
        args += [f"{keys_}:{cache}", f"{values}:{cache}"]
        shapes = (hidden, width), (wide, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden)
        args += [f"{w}:{dtype}[{i},{j}]" for w, (i, j) in zip((wqkv, wo, wg, wu, wd), shapes, strict=True)]
        ops += [
            matmul(qkv, (batch, hidden, width), norm(x), wqkv, dtype=dtype),
            f"""
  attention{n}:{dtype}[{batch},{wide}] = attention[i0<{batch}, i1<{kv}, i2<{group}, i3<{head}]
          at [i0, {group * head}*i1+{head}*i2+i3]
      batch [i0, i1] rows [i2] column i3 keys k1<{keys} head k0<{head}
      {append(keys_, 0, wide)} {append(values, 1, wide + kv * head)}
      q: {qkv}[i0, {group * head}*i1+{head}*i2+k0]
      k: new_{keys_}[i0, k1, i1, k0]
      v: new_{values}[i0, k1, i1, i3]
      score: acc0
      prob: acc0
      epilogue: acc0
      limit: (pos[0] + 1)
""",
            matmul(
                f"o{n}",
                (batch, wide, hidden),
                f"attention{n}[i0, k0]",
                wo,
                epilogue=f"(acc0 + {x}[i0, i1])",
                dtype=dtype,
            ),
            matmul(f"gate_up{n}", (batch, hidden, ffn), norm(f"o{n}"), wg, wu, epilogue="(acc0 * acc1)", dtype=dtype),
            matmul(
                f"down{n}",
                (batch, ffn, hidden),
                f"gate_up{n}[i0, k0]",
                wd,
                epilogue=f"(acc0 + o{n}[i0, i1])",
                dtype=dtype,
            ),
        ]
        x = f"down{n}"
        results += [f"new_{keys_}", f"new_{values}"]
    ops.append(matmul("logits", (batch, hidden, vocab), f"{x}[i0, k0]", "table", transposed=True, dtype=dtype))
    return parse(f"graph decoder({', '.join(args)})\n{''.join(ops)}  return {', '.join(results)}")


def random_program(seed: int, ops: int = 16) -> Graph:
    """Maps, row reductions, contractions and in-place updates over recent values of shape [4, 8]."""
    rng = np.random.default_rng(seed)
    args, text, recent, state = ["x", "y", "state"], [], ["x", "y"], "state"
    for n in range(ops):
        x, y = (str(v) for v in rng.choice(recent[-3:], 2))
        kind, expr = rng.integers(5), ""
        if kind == 0:
            expr = f"({x}[i0, i1] + {y}[i0, -i1+7])"
        elif kind == 1:
            expr = f"(sum[r0<8]({x}[i0, r0]) * {y}[i0, i1])"
        elif kind == 4:
            text.append(f"""
  state{n}:f32[4,8] = update[i0<2, i1<8]
      to {state} at [i0+{rng.integers(3)}, i1], set (out of bounds: clamp)
      expr: {x}[i0, i1]
""")
            state = f"state{n}"
            expr = f"{state}[i0, i1]"
        else:
            args.append(f"w{n}")
            text.append(matmul(f"v{n}", (4, 8, 8), f"{x}[i0, k0]", f"w{n}", transposed=bool(rng.integers(2))))
        if expr:
            text.append(f"  v{n}:f32[4,8] = map[i0<4, i1<8]\n      expr: {expr}\n")
        recent.append(f"v{n}")
    shapes = (f"{a}:f32[{'8' if a.startswith('w') else '4'},8]" for a in args)
    return parse(f"graph random({', '.join(shapes)})\n{''.join(text)}  return {recent[-1]}, {state}")


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
