"""Convolutions: contractions of the windows of an activation with a kernel.

The activation is read where a window has it (`stride * output + dilation * place`). Windows side by side without padding
(the patches of an embedding) so become a plain contraction over a reshaped view, and a kernel with one input feature a
group (depthwise) a sum of a few products. A dilated activation (a transposed convolution) is one convolution for each
residue of the output, with the part of the kernel that meets elements and not the zeros between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity
from jax_mpk.frontend.contraction import accumulator, contracted, plain, result
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import joined, sliced
from jax_mpk.frontend.window import TERMS, place, windowed
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import compute_dtype

NARROW = 8
"""Output features of a group up to which groups with few products are no contractions."""
PHASES = 16
"""Residues of the output up to which each is a convolution of its own."""


@primitive("conv_general_dilated", empty=True)
def _conv(b: Builder, eqn: Equation, x: Tensor, w: Tensor) -> Tensor:
    p = eqn.params
    (xn, xf, *xs), (wo, wi, *ws), (on, of, *os) = p["dimension_numbers"]
    if 0 in x.shape or 0 in w.shape:
        return b.map(eqn.shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype)))
    steps = zip(p["window_strides"], p["lhs_dilation"], p["rhs_dilation"], strict=True)
    axes = tuple(
        _Axis(*dims, low, high, stride, spread, dilation)
        for dims, (low, high), (stride, spread, dilation) in zip(
            zip(xs, ws, os, strict=True), p["padding"], steps, strict=True
        )
    )
    c = _Convolution(xn, xf, wo, wi, on, of, p["feature_group_count"], p["batch_group_count"], axes)
    return c.phases(b, eqn, x, w)


@dataclass(frozen=True)
class _Axis:
    """A spatial axis: the dimensions of activation, kernel and result, the padding, and the steps."""

    x: int
    w: int
    out: int
    low: int
    high: int
    stride: int
    spread: int
    dilation: int


@dataclass(frozen=True)
class _Convolution:
    """The dimensions of batch and features (activation, kernel, result), the groups, and the spatial axes."""

    xn: int
    xf: int
    wo: int
    wi: int
    on: int
    of: int
    groups: int
    images: int
    axes: tuple[_Axis, ...]

    def phases(self, b: Builder, eqn: Equation, x: Tensor, w: Tensor) -> Tensor:
        """The convolution, an axis with a spread activation and no other steps taken apart by residues.

        Output `spread * j + r` meets element `j + t + shift` at place `first + spread * t` of the kernel only.
        """
        for n, a in enumerate(self.axes):
            size, extent = w.shape[a.w], eqn.shape[a.out]
            rest = math.prod(y.spread for y in self.axes)
            if a.spread == 1 or a.stride != 1 or a.dilation != 1 or rest > PHASES:
                continue
            parts = []
            for r in range(min(a.spread, extent)):
                first = (a.low - r) % a.spread
                count, taps = -(-(extent - r) // a.spread), -(-(size - first) // a.spread)
                shape = (*eqn.shape[: a.out], count, *eqn.shape[a.out + 1 :])
                part = replace(eqn, outs=((shape, eqn.dtype),), live=(True,))
                if taps < 1:
                    parts.append(b.map(shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype))))
                    continue
                start, limit, step = [0] * len(w.shape), list(w.shape), [1] * len(w.shape)
                start[a.w], step[a.w] = first, a.spread
                low = (a.low - r - first) // a.spread
                high = count - 1 + taps - low - x.shape[a.x]
                axis = replace(a, low=low, high=high, spread=1)
                c = replace(self, axes=(*self.axes[:n], axis, *self.axes[n + 1 :]))
                parts.append(c.phases(b, part, x, sliced(b, w, start, limit, step)))
            return _interleaved(b, eqn, parts, a.out)
        return self.whole(b, eqn, x, w)

    def whole(self, b: Builder, eqn: Equation, x: Tensor, w: Tensor) -> Tensor:
        compute = accumulator(eqn, x, w)
        config = [(0, 0, 0)] * len(x.shape)
        for a in self.axes:
            config[a.x] = (a.low, a.high, a.spread - 1)
        features = eqn.shape[self.of]
        taps = [k for k in range(len(w.shape)) if k != self.wo and w.shape[k] > 1]
        sizes = tuple(w.shape[k] for k in taps)
        terms = math.prod(sizes) <= (TERMS if self.groups > 1 and features // self.groups <= NARROW else 1)
        points = 1 if terms else math.prod(eqn.shape[a.out] for a in self.axes)
        x = windowed(b, x, config, E.const(0, x.compute), points * math.prod(w.shape[a.w] for a in self.axes))

        axes, zero = identity(eqn.shape), E.coord_const(0)
        group, image = (_group(axes[self.of], features, n) for n in (self.groups, self.images))
        at_x, at_w = [zero] * len(x.shape), [zero] * len(w.shape)
        at_x[self.xn] = E.coord_add(axes[self.on], E.coord_scale(image, eqn.shape[self.on]))
        at_x[self.xf] = E.coord_scale(group, w.shape[self.wi])
        at_w[self.wo] = axes[self.of]
        source = {self.wi: (self.xf, 1)}
        for a in self.axes:
            at_x[a.x] = E.coord_scale(axes[a.out], a.stride)
            source[a.w] = a.x, a.dilation

        def product(place: Sequence[Coord]) -> tuple[Expr, Expr]:
            """Both operands at a place of the kernel: one coordinate for each of `taps`."""
            cx, cw = list(at_x), list(at_w)
            for k, c in zip(taps, place, strict=True):
                d, step = source[k]
                cx[d], cw[k] = E.coord_add(cx[d], E.coord_scale(c, step)), c
            return converted(x.at(cx), x.dtype, compute), converted(w.at(cw), w.dtype, compute)

        if terms:
            out: Expr | None = None
            for n in range(math.prod(sizes)):
                e = E.binary("mul", *product(place(n, sizes)))
                out = e if out is None else E.binary("add", out, e)
            assert out is not None
            return b.map(eqn.shape, eqn.dtype, result(out, compute, eqn.dtype))
        w = plain(b, w, compute)
        k = tuple((E.CORE_AXIS + j, n) for j, n in enumerate(sizes))
        lhs, rhs = product([E.coord_axis(a, n) for a, n in k])
        return contracted(b, eqn, lhs, rhs, k, compute)


def _group(feature: Coord, features: int, count: int) -> Coord:
    """The group of an output feature, of `count` groups."""
    split = E.coord_split(feature, features // count)
    assert split is not None
    return split[0] if count > 1 else E.coord_const(0)


def _interleaved(b: Builder, eqn: Equation, parts: Sequence[Tensor], axis: int) -> Tensor:
    """Index `len(parts) * j + r` along `axis` is index j of part r; the last parts may be one shorter."""
    step, extent = len(parts), eqn.shape[axis]
    whole = extent // step * step
    out = []
    for lo, hi in ((0, whole), (whole, extent)):
        if lo == hi:
            continue
        shape = (*eqn.shape[:axis], hi - lo, *eqn.shape[axis + 1 :])
        at = list(identity(shape))
        split = E.coord_split(at[axis], step)
        assert split is not None
        row, residue = split
        at[axis] = E.coord_add(row, E.coord_const(lo // step))
        pieces = tuple(p.at(at) for p in parts)
        out.append(b.map(shape, eqn.dtype, E.piece(residue, tuple(range(step + 1)), pieces)))
    if len(out) == 1:
        return out[0]
    at, rest = list(identity(eqn.shape)), list(identity(eqn.shape))
    rest[axis] = E.coord_add(rest[axis], E.coord_const(-whole)) if extent - whole > 1 else E.coord_const(0)
    return joined(b, [(out[0].at(at), whole), (out[1].at(rest), extent - whole)], axis, eqn.shape, eqn.dtype)
