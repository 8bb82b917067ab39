"""The frames of the weight streams are the ones that the tasks multiply: every right side, every byte, in their order.

A streamed task goes through its batch points, groups of `COLUMNS` columns and right sides, in that order, and takes the
frames of all of K for each (cuda/tasks/contract.cuh). Nothing tells it what a frame is: it must be the right one.
"""

from __future__ import annotations

import itertools

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import VerifyError
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
    tiles = [-(-e // t) for e, t in zip(x.extent, x.tile, strict=True)]
    digits = np.unravel_index(np.arange(int(np.prod(tiles))), tiles) if tiles else ()
    rhs = [core(x, f"RHS{j}") for j in range(x.param("N_RHS"))]
    base = [p["Slot"][int(x.op["slot"]) + int(a["slot"])] for a in rhs]
    inner = int(np.prod([x.extent[a] for a in n_axes[1:]], dtype=np.int64))
    want: list[tuple[int, int, int]] = []  # task, right side, byte of the first element
    for task in range(int(np.prod(tiles))):
        at = [int(d[task]) for d in digits]
        lo = [i * t for i, t in zip(at, x.tile, strict=True)]
        hi = [min(v + t, e) for v, t, e in zip(lo, x.tile, x.extent, strict=True)]
        start, stop = (lo[n_axes[0]] * inner, hi[n_axes[0]] * inner) if cols else (0, 1)
        for point in itertools.product(*(range(lo[a], hi[a]) for a in range(batch))):
            for column in range(start, stop, COLUMNS):
                for j, a in enumerate(rhs):
                    where = int(a["offset"]) + sum(i * int(a["stride"][b]) for b, i in enumerate(point))
                    where += column * _step(x, a, n_axes)
                    want.append((first + task, j, int(base[j]["offset"]) + where * ITEM))
    if len(entries) != len(want):
        x.fail(f"its stream has {len(entries)} runs of frames, and its tasks take {len(want)}")
    w = np.array(want, np.int64).reshape(-1, 3)
    maps = p["TensorMap"][entries["map"]]
    have = maps["offset"].astype(np.int64) + (entries["start"] * maps["strides"].astype(np.int64)).sum(1)
    sides = np.array([int(b["buffer"]) for b in base])[w[:, 1]]
    bad = (number[entries["task"]] != w[:, 0]) | (have != w[:, 2]) | (maps["buffer"] != sides)
    for e in np.flatnonzero(bad)[:1]:
        x.fail(f"run {e} of its stream begins at byte {have[e]} of buffer {maps['buffer'][e]}, where byte {w[e, 2]} of buffer "
               f"{sides[e]} is multiplied")  # fmt: skip
    known: set[bytes] = set()
    for j, a in enumerate(rhs):
        for e in np.flatnonzero(w[:, 1] == j).tolist():
            _frames(x, entries[e], maps[e], _step(x, a, n_axes), _step(x, a, k_axes), K, known)


def _frames(x: Operator, e: np.void, m: np.void, step_n: int, step_k: int, K: int, known: set[bytes]) -> None:
    """Box and steps of a run of frames: `COLUMNS` columns, K in steps of `DEPTH`."""
    key = m.tobytes() + e["step"].tobytes() + np.array([e["frames"], step_n, step_k, K], np.int64).tobytes()
    if key in known:
        return
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
    known.add(key)


def _step(x: Operator, a: np.void, axes: range) -> int:
    """The stride of the flattened index over `axes`."""
    real = [b for b in axes if x.extent[b] > 1]
    return int(a["stride"][real[-1]]) if real else 0
