"""Convolutions: contractions of the windows of an activation with a kernel.

The activation is read where a window has it (`stride * output + dilation * place`), padded as a view: nothing is copied
that a contraction does not copy. Windows side by side without padding (the patches of an embedding) so become a plain
contraction, and a kernel with one input feature a group (depthwise) a sum of a few products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity
from jax_mpk.frontend.contraction import contracted, plain, result
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import padded
from jax_mpk.frontend.window import TERMS
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import compute_dtype

NARROW = 8
"""Output features of a group up to which groups with few products are no contractions."""


@primitive("conv_general_dilated", empty=True)
def _conv(b: Builder, eqn: Equation, x: Tensor, w: Tensor) -> Tensor:
    p = eqn.params
    (xn, xf, *xs), (wo, wi, *ws), (on, of, *os) = p["dimension_numbers"]
    if 0 in x.shape or 0 in w.shape:
        return b.map(eqn.shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype)))
    compute = "f32" if "f32" in (x.compute, w.compute) else "u32" if eqn.dtype[0] == "u" else "i32"
    config = [(0, 0, 0)] * len(x.shape)
    for d, (lo, hi), step in zip(xs, p["padding"], p["lhs_dilation"], strict=True):
        config[d] = (lo, hi, step - 1)
    x = padded(b, x, config, E.const(0, x.compute))

    axes, features = identity(eqn.shape), eqn.shape[of]
    groups, images = p["feature_group_count"], p["batch_group_count"]
    group, image = (_group(axes[of], features, n) for n in (groups, images))
    zero = E.coord_const(0)
    at_x, at_w = [zero] * len(x.shape), [zero] * len(w.shape)
    at_x[xn] = E.coord_add(axes[on], E.coord_scale(image, eqn.shape[on]))
    at_x[xf] = E.coord_scale(group, w.shape[wi])
    at_w[wo] = axes[of]
    for d, o, stride in zip(xs, os, p["window_strides"], strict=True):
        at_x[d] = E.coord_scale(axes[o], stride)
    source = {wi: (xf, 1)} | {k: (d, step) for k, d, step in zip(ws, xs, p["rhs_dilation"], strict=True)}
    taps = [(k, *source[k], w.shape[k]) for k in range(len(w.shape)) if k != wo and w.shape[k] > 1]

    def product(place: Sequence[Coord]) -> tuple[Expr, Expr]:
        """Both operands at a place of the kernel: one coordinate for each of `taps`."""
        cx, cw = list(at_x), list(at_w)
        for (k, d, step, _), c in zip(taps, place, strict=True):
            cx[d], cw[k] = E.coord_add(cx[d], E.coord_scale(c, step)), c
        return converted(x.at(cx), x.dtype, compute), converted(w.at(cw), w.dtype, compute)

    sizes = tuple(n for *_, n in taps)
    if math.prod(sizes) <= (TERMS if groups > 1 and features // groups <= NARROW else 1):
        out: Expr | None = None
        for n in range(math.prod(sizes)):
            e = E.binary("mul", *product(_place(n, sizes)))
            out = e if out is None else E.binary("add", out, e)
        assert out is not None
        return b.map(eqn.shape, eqn.dtype, result(out, compute, eqn.dtype))
    if compute == "f32":
        w = plain(b, w)
    k = tuple((E.CORE_AXIS + j, n) for j, n in enumerate(sizes))
    lhs, rhs = product([E.coord_axis(a, n) for a, n in k])
    return contracted(b, eqn, lhs, rhs, k, compute)


def _group(feature: Coord, features: int, count: int) -> Coord:
    """The group of an output feature, of `count` groups."""
    split = E.coord_split(feature, features // count)
    assert split is not None
    return split[0] if count > 1 else E.coord_const(0)


def _place(n: int, sizes: tuple[int, ...]) -> list[Coord]:
    out = []
    for size in reversed(sizes):
        n, at = divmod(n, size)
        out.append(E.coord_const(at))
    return out[::-1]
