"""The frames of the weight streams are the ones that the tasks multiply: every right side, every byte, in their order.

A streamed task goes through its batch points, groups of `COLUMNS` columns and right sides, in that order, and takes the
frames of all of K for each (cuda/kinds/contract.cuh). Nothing tells it what a frame is: it must be the right one.
"""

from __future__ import annotations

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import VerifyError
from jax_mpk.ir.boxes import ragged
from jax_mpk.verify.codes import Operator, core

COLUMNS, DEPTH, INNER = 64, 128, 64
"""A frame: columns, elements of K, and elements of its contiguous run, all bf16."""
ITEM = 2


def check(p: abi.Program, number: np.ndarray, first: np.ndarray) -> None:
    """`number`: the task of every record; `first`: the first task of every operator."""
    s, t, streamed = p["Stream"], p["Task"], (p["Unit"]["flags"] & abi.STREAMED) != 0
    if len(s) and s["task"].max() >= len(t):
        raise VerifyError(f"a stream entry names task record {s['task'].max()} of {len(t)}")
    if (np.diff(s["task"].astype(np.int64)) < 0).any() or (s["worker"] != t["worker"][s["task"]]).any():
        raise VerifyError("the entries of the streams are not in the order of their workers' tasks")
    if streamed.any() and not p["Kernel"][0]["ring"]:
        raise VerifyError("operators are streamed, and there is no ring")
    op = t["op"][s["task"]]
    for e in np.flatnonzero(~streamed[op])[:1]:
        raise VerifyError(f"operator {p.name(int(p['Op'][op[e]]['name']))} has frames, and does not take them")
    maps = p["TensorMap"]
    if len(s) and s["map"].max() >= len(maps):
        raise VerifyError(f"a stream entry names tensor map {s['map'].max()} of {len(maps)}")
    by = np.argsort(number[s["task"]], kind="stable")  # task by task, in order
    ends = np.searchsorted(number[s["task"]][by], np.append(first, len(np.unique(number))))
    for n in np.flatnonzero(streamed).tolist():
        _operator(p, n, s[by[ends[n] : ends[n + 1]]], number, int(first[n]))


def _operator(p: abi.Program, n: int, entries: np.ndarray, number: np.ndarray, first: int) -> None:
    x = Operator(p, p["Op"][n], p.name(int(p["Op"][n]["name"])))
    batch, m, cols, k = (x.param(f"N_{r}") for r in ("BATCH", "M", "N", "K"))
    n_axes, k_axes = range(batch + m, batch + m + cols), range(x.axes - k, x.axes)
    K = int(np.prod([x.extent[a] for a in k_axes], dtype=np.int64))
    rhs = [core(x, f"RHS{j}") for j in range(x.param("N_RHS"))]
    base = [p["Slot"][int(x.op["slot"]) + int(a["slot"])] for a in rhs]
    inner = int(np.prod([x.extent[a] for a in n_axes[1:]], dtype=np.int64))
    task, point, column = _runs(x, batch, n_axes[0] if cols else -1, inner)
    byte: np.ndarray = np.empty((len(task), len(rhs)), np.int64)  # of the first element
    for j, a in enumerate(rhs):
        where = int(a["offset"]) + point @ a["stride"][:batch].astype(np.int64) + column * _step(x, a, n_axes)
        byte[:, j] = int(base[j]["offset"]) + where * ITEM
    side = np.tile(np.arange(len(rhs)), len(task))
    task, byte = first + np.repeat(task, len(rhs)), byte.reshape(-1)
    if len(entries) != len(task):
        x.fail(f"its stream has {len(entries)} runs of frames, and its tasks take {len(task)}")
    maps = p["TensorMap"][entries["map"]]
    have = maps["offset"].astype(np.int64) + (entries["start"] * maps["strides"].astype(np.int64)).sum(1)
    sides = np.array([int(b["buffer"]) for b in base])[side]
    bad = (number[entries["task"]] != task) | (have != byte) | (maps["buffer"] != sides)
    for e in np.flatnonzero(bad)[:1]:
        x.fail(f"run {e} of its stream begins at byte {have[e]} of buffer {maps['buffer'][e]}, where byte {byte[e]} of buffer "
               f"{sides[e]} is multiplied")  # fmt: skip
    for j, a in enumerate(rhs):
        mine = np.flatnonzero(side == j)
        form = np.column_stack([entries["map"], entries["frames"], entries["step"]])[mine]
        for e in mine[np.unique(form, axis=0, return_index=True)[1]].tolist():
            _frames(x, entries[e], maps[e], _step(x, a, n_axes), _step(x, a, k_axes), K)


def _runs(x: Operator, batch: int, n_axis: int, inner: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the tasks multiply, in their order: task, batch point (one column an axis) and first column of every run of frames.
    `n_axis`: the outer axis of the columns, each `inner` of them (-1: there is one column)."""
    extent, tile = (np.array(v, np.int64)[: x.axes] for v in (x.extent, x.tile))
    tiles = -(-extent // tile)
    task = np.arange(int(tiles.prod()))
    lo = np.stack(np.unravel_index(task, tuple(tiles)), 1) * tile if len(tiles) else np.zeros((1, 0), np.int64)
    hi = np.minimum(lo + tile, extent)
    size = hi[:, :batch] - lo[:, :batch]
    task, at = ragged(np.zeros(len(task), np.int64), size.prod(1))
    point = lo[task, :batch]
    for a in range(batch - 1, -1, -1):
        point[:, a] += at % size[task, a]
        at = at // size[task, a]
    start, stop = (lo[task, n_axis] * inner, hi[task, n_axis] * inner) if n_axis >= 0 else (0 * task, 0 * task + 1)
    i, group = ragged(np.zeros(len(task), np.int64), -(-(stop - start) // COLUMNS))
    return task[i], point[i], start[i] + group * COLUMNS


def _frames(x: Operator, e: np.void, m: np.void, step_n: int, step_k: int, K: int) -> None:
    """Box and steps of a run of frames: `COLUMNS` columns, K in steps of `DEPTH`."""
    strides, box, dims = m["strides"].tolist(), m["box"].tolist(), m["dims"].tolist()
    advance = int((e["step"] * m["strides"].astype(np.int64)).sum())
    if step_n == 1:
        good = box[0] == COLUMNS and box[1] == DEPTH and strides[1] == step_k * ITEM and dims[1] == K
    else:
        good = (box[:3] == [INNER, COLUMNS, DEPTH // INNER] and dims[0] == INNER and dims[2] * INNER == K
                and strides[1] == step_n * ITEM and strides[2] == INNER * ITEM and step_k == 1)  # fmt: skip
    good = good and strides[0] == ITEM and all(b == 1 for b in box[2 if step_n == 1 else 3 : int(m["rank"])])
    if not good or advance != DEPTH * step_k * ITEM or int(e["frames"]) != -(-K // DEPTH):
        x.fail(f"frames of {box}, {e['frames']} in steps of {advance} bytes, are not its {K} by {COLUMNS}")


def _step(x: Operator, a: np.void, axes: range) -> int:
    """The stride of the flattened index over `axes`."""
    real = [b for b in axes if x.extent[b] > 1]
    return int(a["stride"][real[-1]]) if real else 0
