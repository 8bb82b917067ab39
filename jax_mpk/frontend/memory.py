"""Data-dependent indexing: slices, gathers, and the updates that are written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_mpk import _compat
from jax_mpk.frontend.builder import Builder, Equation, Tensor, as_i32, clamp, identity, rounded
from jax_mpk.frontend.fold import elementwise_calls
from jax_mpk.frontend.reduction import MONOIDS
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import transposed
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import Append, Update

_OUTSIDE = -(2**30)
"""A coordinate that stays out of bounds whatever is added to it inside a window."""


def window_coord(offset: Coord, start: Expr, window: int, extent: int) -> Coord:
    """`start + offset` where the start is clamped so that a window of this size stays inside the dimension."""
    if window == extent:
        return offset
    if isinstance(start, E.Const):
        return E.coord_add(offset, E.coord_const(min(max(int(start.value), 0), extent - window)))
    if window == 1:  # the coordinate's own clamp is the same one
        return Coord(offset.const, offset.terms, start, extent - 1)
    return Coord(offset.const, offset.terms, clamp(start, 0, extent - window), extent - 1)


@primitive("dynamic_slice", moves=True)
def _dynamic_slice(b: Builder, eqn: Equation, x: Tensor, *starts: Tensor) -> Tensor:
    coords = [
        window_coord(c, as_i32(s.over(())), w, n)
        for c, s, w, n in zip(identity(eqn.shape), starts, eqn.shape, x.shape, strict=True)
    ]
    return b.map(eqn.shape, eqn.dtype, x.at(coords))


@primitive("dynamic_update_slice", moves=True, empty=True)
def _dynamic_update_slice(b: Builder, eqn: Equation, x: Tensor, update: Tensor, *starts: Tensor) -> Tensor:
    if 0 in update.shape:
        return x
    coords = tuple(
        window_coord(c, as_i32(s.over(())), w, n)
        for c, s, w, n in zip(identity(update.shape), starts, update.shape, x.shape, strict=True)
    )
    return _update(b, x, update.shape, update.over(update.shape), coords, "set", "clamp")


def _update(b: Builder, target: Tensor, window: tuple[int, ...], e: Expr, coords: tuple[Coord, ...], mode: str,
            oob: str) -> Tensor:  # fmt: skip
    target = b.materialise(target)
    out = b.value(target.shape, target.dtype)
    append = Append(target.value, out, window, tuple(range(len(window))), e, coords, mode, oob)
    b.emit(Update(out, window, b.source, None, append))
    return Tensor(target.shape, target.dtype, out)


# --------------------------------------------------------------------------------------------------- gather and scatter


class _Indexing:
    """The dimension numbers of a gather or scatter, over the domain of its windows (the gather's result).

    `offsets`, `batch`: domain axes inside a window, and those that enumerate windows. For each operand dimension:
    `offset[d]`, the coordinate inside the window (0 for collapsed ones); `start[d]`, the index expression or None.
    """

    def __init__(self, shape: tuple[int, ...], domain: tuple[int, ...], indices: Tensor, offset_dims: Sequence[int],
                 hidden: Sequence[int], start_map: Sequence[int], operand_batch: Sequence[int],
                 indices_batch: Sequence[int]):  # fmt: skip
        axes = identity(domain)
        inside = [int(d) for d in offset_dims]
        batch = [a for a in range(len(domain)) if a not in inside]
        gone = {int(d) for d in (*hidden, *operand_batch)}
        visible = [d for d in range(len(shape)) if d not in gone]
        zero = E.coord_const(0)
        self.shape, self.window = shape, [1] * len(shape)
        self.offset: list[Coord] = [zero] * len(shape)
        self.start: list[Expr | None] = [None] * len(shape)
        for d, a in zip(visible, inside, strict=True):
            self.offset[d], self.window[d] = axes[a], domain[a]
        points = [axes[a] if n != 1 else zero for a, n in zip(batch, indices.shape, strict=False)]
        for d, p in zip(operand_batch, indices_batch, strict=True):
            self.offset[int(d)] = points[int(p)]
        for k, d in enumerate(start_map):
            self.start[int(d)] = as_i32(indices.at((*points, E.coord_const(k))))

    def inside(self) -> Expr | None:
        """Whether every window lies inside (None: always)."""
        out = None
        for start, w, n in zip(self.start, self.window, self.shape, strict=True):
            if start is not None:
                low = E.binary("le", E.const(0, "i32"), start)
                both = E.binary("and", low, E.binary("le", start, E.const(n - w, "i32")))
                out = both if out is None else E.binary("and", out, both)
        return out

    def clamped(self) -> tuple[Coord, ...]:
        """Coordinates with every window moved inside."""
        return tuple(
            c if s is None else window_coord(c, s, w, n)
            for c, s, w, n in zip(self.offset, self.start, self.window, self.shape, strict=True)
        )

    def dropped(self) -> tuple[Coord, ...]:
        """Coordinates that are out of bounds, for every point of a window of which any point is."""
        out = []
        for c, s, w, n in zip(self.offset, self.start, self.window, self.shape, strict=True):
            if s is not None and w > 1:
                fits = E.binary("and", E.binary("le", E.const(0, "i32"), s), E.binary("le", s, E.const(n - w, "i32")))
                s = E.select(fits, s, E.const(_OUTSIDE, "i32"))
            out.append(c if s is None else Coord(c.const, c.terms, s, n - 1))
        return tuple(out)


@primitive("gather", moves=True)
def _gather(b: Builder, eqn: Equation, x: Tensor, indices: Tensor) -> Tensor:
    p = eqn.params
    d = p["dimension_numbers"]
    at = _Indexing(x.shape, eqn.shape, indices, d.offset_dims, d.collapsed_slice_dims, d.start_index_map,
                   d.operand_batching_dims, d.start_indices_batching_dims)  # fmt: skip
    e = x.at(at.clamped())
    if _compat.gather_mode(p["mode"]) == "fill":
        inside = at.inside()
        if inside is not None:
            e = E.select(inside, e, E.const(np.asarray(p["fill_value"]).item(), x.compute))
    return b.map(eqn.shape, eqn.dtype, e)


_MODES = {"scatter": "set", "scatter_add": "add", "scatter_sub": "add", "scatter_mul": "mul", "scatter_min": "min",
          "scatter_max": "max"}  # fmt: skip
_NAMED = {"sum": "add", "prod": "mul", "min": "min", "max": "max"}


@primitive("scatter", moves=True, empty=True)
@primitive("scatter_add", "scatter-add", "scatter_sub", "scatter-sub", "scatter_mul", "scatter-mul", "scatter_min",
           "scatter-min", "scatter_max", "scatter-max", empty=True)  # fmt: skip
def _scatter(b: Builder, eqn: Equation, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if 0 in updates.shape:
        return x
    p = eqn.params
    d = p["dimension_numbers"]
    windows = [int(a) for a in d.update_window_dims]
    order = [a for a in range(len(updates.shape)) if a not in windows] + windows
    if order != sorted(order):  # XLA goes through the indices, and at each of them through its window
        updates = transposed(b, updates, order)
        windows = list(range(len(order) - len(windows), len(order)))
    at = _Indexing(x.shape, updates.shape, indices, windows, d.inserted_window_dims,
                   d.scatter_dims_to_operand_dims, d.operand_batching_dims,
                   d.scatter_indices_batching_dims)  # fmt: skip
    # With a promise that all are in bounds (the default of `x[i]` and its gradient since 0.11), XLA drops the others, too.
    drop = _compat.gather_mode(p["mode"]) != "clip" and any(s is not None for s in at.start)
    coords = at.dropped() if drop else at.clamped()
    oob = "drop" if drop else "clamp"
    mode = _MODES[eqn.primitive.replace("-", "_")]
    e = updates.over(updates.shape)
    if eqn.primitive.endswith("sub"):
        # Not a negation, which would turn the sign of a NaN, and with it the place that `top_k` gives it.
        e = rounded(E.binary("sub", E.const(-0.0, "f32"), e) if e.dtype == "f32" else E.unary("neg", e), x.dtype)
    if mode == "set" and p.get("update_jaxpr") is not None:
        return _apply(b, eqn, x, at, updates.shape, coords, oob)
    if mode == "add" and x.dtype == "bool":
        b.unsupported("sums of booleans")
    return _update(b, x, updates.shape, e, coords, mode, oob)


def _apply(b: Builder, eqn: Equation, x: Tensor, at: _Indexing, shape: tuple[int, ...], coords: tuple[Coord, ...],
           oob: str) -> Tensor:  # fmt: skip
    """`f(old)` at every place, once for every time that an index names it; the updates do not count.

    Where no place is named twice, that is what was there, through `f`, stored. Else `f` must combine with a constant.
    """
    jaxpr = eqn.params["update_jaxpr"]
    consts = eqn.params.get("update_consts", ())
    single = all(s is None or not s.axes for s in at.start)
    if eqn.params["unique_indices"] or single:
        x = b.materialise(x)
        old = b.map(shape, x.dtype, x.at(at.clamped()))
        (new,) = elementwise_calls(b, (jaxpr, consts), shape)([old], [old])
        return _update(b, x, shape, new.over(shape), coords, "set", oob)
    found = _with_constant(jaxpr)
    if found is None or x.dtype == "bool":
        b.unsupported("a function that may be applied several times to one element and is not x + c, x * c, "
                      "max(x, c) or min(x, c)")  # fmt: skip
    mode, value = found
    return _update(b, x, shape, E.const(value, x.compute), coords, mode, oob)


def _with_constant(jaxpr: Any) -> tuple[str, Any] | None:
    """(mode, c) of a jaxpr of (x, unused) that is one operation of x and a constant."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    if len(jaxpr.eqns) != 1:
        return None
    (eqn,) = jaxpr.eqns
    mode = _NAMED.get(MONOIDS.get(eqn.primitive.name, ""))
    known = [v for v in eqn.invars if _compat.is_literal(v)]
    if mode is None or len(known) != 1 or jaxpr.invars[0] not in eqn.invars or list(jaxpr.outvars) != list(eqn.outvars):
        return None
    return mode, np.asarray(known[0].val, known[0].aval.dtype).item()
