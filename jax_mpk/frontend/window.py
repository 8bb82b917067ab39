"""Windows that slide over a tensor: where they are, and reductions over them.

A tensor is padded first (a view, or a copy where it is dilated). A small window is then a few terms, each the whole
tensor shifted, so that they run along the axes as they lie in memory; a large one is a reduction over window axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax_mpk.frontend.fold import elementwise_calls
from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.reduction import combine, monoid, neutral
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import padded
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr

TERMS = 64
"""Places of a window up to which each is a term of its own."""


@dataclass(frozen=True)
class Windows:
    """Windows of `size` over a (padded) tensor, one at each point of a result of `shape`."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def places(self) -> int:
        return math.prod(self.size)

    def at(self, x: Tensor, place: Sequence[Coord]) -> Expr:
        """The element of `x` at a place of the window of a point."""
        return x.at([
            E.coord_add(E.coord_scale(c, s), E.coord_scale(k, d))
            for c, s, k, d in zip(identity(self.shape), self.stride, place, self.dilation, strict=True)
        ])  # fmt: skip

    def terms(self, x: Tensor) -> list[Expr]:
        """The elements of a window in row-major order, as one expression a place."""
        out = []
        for n in range(self.places):
            place = []
            for k in reversed(self.size):
                n, at = divmod(n, k)
                place.append(E.coord_const(at))
            out.append(self.at(x, place[::-1]))
        return out


def windows(b: Builder, eqn: Equation, x: Tensor, fill: Expr) -> tuple[Windows, Tensor]:
    """The windows that the parameters of `eqn` describe, and `x` padded for them."""
    p, rank = eqn.params, len(x.shape)
    base, dilation = (tuple(p.get(k) or (1,) * rank) for k in ("base_dilation", "window_dilation"))
    config = [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], base, strict=True)]
    size, stride = (tuple(map(int, p[k])) for k in ("window_dimensions", "window_strides"))
    return Windows(eqn.shape, size, stride, dilation), padded(b, x, config, fill)


def reduced(w: Windows, x: Tensor, op: str) -> Expr:
    """`op` over the window of a point."""
    if w.places <= TERMS:
        out, *rest = w.terms(x)
        for e in rest:
            out = combine(op, out, e)
        return out
    bound = [(E.REDUCE_AXIS + j, n) for j, n in enumerate(w.size)]
    live = [(a, n) for a, n in bound if n > 1]
    e = w.at(x, [E.coord_axis(a, n) for a, n in bound])
    return E.reduce(op, e, tuple(a for a, _ in live), tuple(n for _, n in live))


def _reduction(b: Builder, eqn: Equation, x: Tensor, op: str, init: Expr | None = None) -> Tensor:
    """`init` is what the padding holds and what each window starts from (None: the neutral element)."""
    w, x = windows(b, eqn, x, neutral(op, x.dtype) if init is None else init)
    e = reduced(w, x, op)
    e = e if init is None else combine(op, init, e)
    return b.map(eqn.shape, eqn.dtype, rounded(e, eqn.dtype) if op in ("sum", "prod") else e)


@primitive("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _known(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return _reduction(b, eqn, x, eqn.primitive.removeprefix("reduce_window_"))


@primitive("reduce_window")
def _reduce_window(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    """By any function of scalars; one without a name is written out for every place of the window."""
    xs, inits = xs[: len(xs) // 2], xs[len(xs) // 2 :]
    jaxpr = eqn.params["jaxpr"]
    op = monoid(jaxpr) if len(xs) == 1 else None
    if op is not None:
        return [_reduction(b, eqn, xs[0], op, inits[0].over(()))]
    consts = eqn.params.get("consts", ())
    columns = []
    for x, init in zip(xs, inits, strict=True):
        w, x = windows(b, eqn, x, init.over(()))
        if w.places > TERMS:
            b.unsupported(f"a function of its own over windows of {w.places} places, there may be {TERMS}")
        columns.append([b.map(eqn.shape, x.dtype, e) for e in w.terms(x)])
    out, *rest = zip(*columns, strict=True)
    f = elementwise_calls(b, (jaxpr, consts) if consts else jaxpr, eqn.shape)
    for terms in rest:
        out = f(out, terms)
    return out
