"""Reductions by functions that no instruction reduces by: a few elements at a time, by the function written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc

from jax_mpk import _compat
from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.reduction import combine, monoid, neutral, reduced
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import padded, pick
from jax_mpk.ir import expr as E

FAN = 16
"""Elements that one operator combines."""

Combine = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Combines two lists of tensors of one shape, element by element."""


def elementwise_calls(b: Builder, jaxpr: Any, shape: tuple[int, ...]) -> Combine:
    """A function of twice n scalars (a closed jaxpr, or a pair of jaxpr and consts) on tensors of `shape`."""
    closed = jc.ClosedJaxpr(*(jaxpr if isinstance(jaxpr, tuple) else _compat.open_jaxpr(jaxpr)))
    f = jc.jaxpr_as_fun(closed)
    for _ in shape:
        f = jax.vmap(f)
    batched = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, a.dtype) for a in closed.in_avals))
    return lambda xs, ys: b.inline(batched, (*xs, *ys), (True,) * len(xs), b.source.where)


def folded(b: Builder, xs: Sequence[Tensor], axis: int, fill: Sequence[E.Expr],
           make: Callable[[tuple[int, ...]], Combine]) -> list[Tensor]:  # fmt: skip
    """`xs` combined along `axis`, which goes; in order. `fill` are neutral elements, `make(shape)` the function."""
    xs = list(xs)
    while (n := xs[0].shape[axis]) > 1:
        fan = min(n, FAN)
        count = math.ceil(n / fan)
        shape = (*xs[0].shape[:axis], count, *xs[0].shape[axis + 1 :])
        edge = [(0, count * fan - n if d == axis else 0, 0) for d in range(len(shape))]
        wide = [padded(b, x, edge, f) for x, f in zip(xs, fill, strict=True)]
        rows = []
        for j in range(fan):
            coords = list(identity(shape))
            coords[axis] = E.coord_add(E.coord_scale(coords[axis], fan), E.coord_const(j))
            rows.append([b.map(shape, x.dtype, x.at(coords)) for x in wide])
        f = make(shape)
        out: Sequence[Tensor] = rows[0]
        for row in rows[1:]:
            out = f(out, row)
        xs = list(out)
    return [pick(b, x, axis, 0) for x in xs]


def _named(b: Builder, op: str) -> Callable[[tuple[int, ...]], Combine]:
    def make(shape: tuple[int, ...]) -> Combine:
        def f(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
            return [
                b.map(shape, x.dtype, rounded(combine(op, x.over(shape), y.over(shape)), x.dtype))
                for x, y in zip(xs, ys, strict=True)
            ]

        return f

    return make


@primitive("reduce_xor", empty=True)
def _reduce_xor(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    if 0 in x.shape:
        return b.map(eqn.shape, eqn.dtype, neutral("xor", x.dtype))
    for axis in sorted(eqn.params["axes"], reverse=True):
        (x,) = folded(b, [b.materialise(x)], axis, [neutral("xor", x.dtype)], _named(b, "xor"))
    return x


@primitive("reduce", empty=True)
def _reduce(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    """By any function of scalars, of which the initial values are neutral elements."""
    xs, inits = xs[: len(xs) // 2], xs[len(xs) // 2 :]
    jaxpr, axes = eqn.params["jaxpr"], sorted(eqn.params["dimensions"], reverse=True)
    fill = [i.over(()) for i in inits]
    if 0 in xs[0].shape:
        return [b.map(shape, dtype, e) for (shape, dtype), e in zip(eqn.outs, fill, strict=True)]
    op = monoid(jaxpr) if len(xs) == 1 else None
    if op is not None and op != "xor":
        return [reduced(b, eqn, xs[0], axes, op, fill[0])]
    out = [b.materialise(x) for x in xs]
    for axis in axes:
        out = folded(b, out, axis, fill, lambda shape: elementwise_calls(b, jaxpr, shape))
    shape = out[0].shape
    first = [b.map(shape, t.dtype, i) for t, i in zip(out, fill, strict=True)]
    return elementwise_calls(b, jaxpr, shape)(first, out)
