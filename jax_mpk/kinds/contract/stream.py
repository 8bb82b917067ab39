"""Weights as the tensor copy engine brings them: the frames of a contraction's right sides, in the order of use.

A *stream operand* is a weight that the program only reads, through a plain strided access.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from jax_mpk.device import Device
from jax_mpk.ir.boxes import ragged
from jax_mpk.ir.expr import Load
from jax_mpk.ir.graph import Contract, itemsize
from jax_mpk.ir.loops import flatten
from jax_mpk.ir.tasks import Grid, TensorMap
from jax_mpk.kinds.bound import Bound

RANK = 4
"""Dimensions of a tensor map."""


@dataclass(frozen=True)
class Operand:
    """A stream operand: the tensor map but for its buffer (`value`), columns and steps of k of a frame, and which
    dimensions of the map are the columns, k and the batch."""

    value: int
    offset: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    columns: int
    step: int
    dim_n: int
    dim_k: int
    dim_batch: tuple[int, ...]

    def map(self, buffer: int, dtype: str) -> TensorMap:
        return TensorMap(buffer, self.offset, dtype, self.dims, self.strides, self.box)

    @property
    def frames(self) -> int:
        """Frames of a group of columns."""
        return math.ceil(self.dims[self.dim_k] / self.step)


def operands(b: Bound, device: Device, fixed: Collection[int]) -> list[Operand] | None:
    """The right sides as stream operands; None unless all are. `fixed`: the values that the program only reads."""
    op = b.op
    assert isinstance(op, Contract)
    out = [_operand(b, j, device) if op.rhs[j].value in fixed else None for j in range(len(op.rhs))]  # type: ignore[attr-defined]
    return out if all(x is not None for x in out) else None  # type: ignore[return-value]


def _operand(b: Bound, j: int, device: Device) -> Operand | None:
    assert isinstance(b.op, Contract)
    rhs = b.op.rhs[j]
    assert isinstance(rhs, Load)
    value = b.graph.values[rhs.value]
    access = flatten(value, rhs.coords)
    size = itemsize(value.dtype)
    inner, rows = device.inner // size, device.frame // device.inner
    axes = [x for x in b.axes if x.extent > 1]
    n, k, batch = ([x for x in axes if x.role == r] for r in ("n", "k", "batch"))
    extent_n, extent_k = math.prod(x.extent for x in n), math.prod(x.extent for x in k)
    step_n, step_k = access.stride(n[-1].axis) if n else 0, access.stride(k[-1].axis) if k else 0
    if access.dyn or 1 not in (step_n, step_k) or not step_n or not step_k:
        return None
    if step_n == 1:
        dims, strides, box = [extent_n, extent_k], [1, step_k], [inner, rows]
        shape = (inner, rows, 0, 1)
    else:
        if extent_k % inner:
            return None  # the last run of a row would reach into the next row
        dims, strides, box = [inner, extent_n, extent_k // inner], [1, step_n, inner], [inner, device.columns]
        box.append(max(1, rows // device.columns))
        shape = (device.columns, box[2], 1, 2)
    where = tuple(range(len(dims), len(dims) + len(batch)))
    dims += [x.extent for x in batch]
    strides += [access.stride(x.axis) for x in batch]
    if len(dims) > RANK or any(s <= 0 or s * size % 16 for s in strides[1:]) or access.offset * size % 16:
        return None
    box += [1] * len(batch)
    if any(w > d for w, d in zip(box, dims, strict=True)):
        return None  # smaller than a frame: not worth a stream
    return Operand(
        rhs.value, access.offset * size, tuple(dims), tuple(s * size for s in strides), tuple(box), *shape, where
    )


def entries(grid: Grid, b: Bound, x: Operand) -> np.ndarray:
    """One row per task, batch point of its tile, and group of columns of its tile: task, place inside the task, 0, frames,
    first coordinates, step."""
    axes = b.axes
    parts = [math.ceil(e / t) for e, t in zip(grid.extent, grid.tile, strict=True)]
    digit = np.unravel_index(np.arange(grid.count), parts)
    row = np.arange(grid.count)
    start = np.zeros((grid.count, RANK), np.int64)
    at = iter(x.dim_batch)
    for n, axis in enumerate(axes):
        if axis.role == "batch" and axis.extent > 1:
            lo = digit[n][row] * grid.tile[n]
            i, value = ragged(lo, np.minimum(lo + grid.tile[n], axis.extent))
            row, start = row[i], start[i]
            start[:, next(at)] = value
    n_axes = [n for n, axis in enumerate(axes) if axis.role == "n"]
    inner = math.prod(axes[n].extent for n in n_axes[1:])
    lo = digit[n_axes[0]] * grid.tile[n_axes[0]]
    hi = np.minimum(lo + grid.tile[n_axes[0]], grid.extent[n_axes[0]])
    i, group = ragged(np.zeros_like(row), -(-(hi - lo)[row] * inner // x.columns))
    row, start = row[i], start[i]
    start[:, x.dim_n] = lo[row] * inner + group * x.columns
    out = np.zeros((len(row), 4 + 2 * RANK), np.int64)
    out[:, 0], out[:, 1] = grid.first + row, np.arange(len(row))
    out[:, 3], out[:, 4 : 4 + RANK] = x.frames, start
    out[:, 4 + RANK + x.dim_k] = x.step
    return out
