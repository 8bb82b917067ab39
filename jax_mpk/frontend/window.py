"""Windows that slide over a tensor: where they are, and reductions over them.

A tensor is padded first (a view, or a copy where it is dilated). A small window is then a few terms, each the whole
tensor shifted, so that they run along the axes as they lie in memory; a large one is a reduction over window axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity, rounded
from jax_mpk.frontend.fold import elementwise_calls
from jax_mpk.frontend.reduction import combine, monoid, neutral
from jax_mpk.frontend.registry import primitive
from jax_mpk.frontend.shape import padded
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr

TERMS = 64
"""Places of a window up to which each is a term of its own."""
PIECES = 9
"""Reads of a padded tensor up to which it is no copy."""


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
        return [self.at(x, place(n, self.size)) for n in range(self.places)]


def place(n: int, size: Sequence[int]) -> list[Coord]:
    """Number `n`, in row-major order, of the places of a window."""
    out = []
    for k in reversed(size):
        n, at = divmod(n, k)
        out.append(E.coord_const(at))
    return out[::-1]


def windowed(b: Builder, x: Tensor, config: Sequence[tuple[int, int, int]], fill: Expr, reads: int) -> Tensor:
    """`x` padded (as `padded` does) for windows that read `reads` places: a view where these are few, else a copy.

    A view costs no hop, but every place asks whether it is inside, or is a case of its own in the code.
    """
    out = padded(b, x, config, fill)
    edges = any(lo > 0 or hi > 0 for lo, hi, _ in config)
    return b.stored(out) if edges and reads > PIECES and out.splat is None else out


def windows(b: Builder, eqn: Equation, x: Tensor, fill: Expr) -> tuple[Windows, Tensor]:
    """The windows that the parameters of `eqn` describe, and `x` padded for them."""
    p, rank = eqn.params, len(x.shape)
    base, dilation = (tuple(p.get(k) or (1,) * rank) for k in ("base_dilation", "window_dilation"))
    config = [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], base, strict=True)]
    size, stride = (tuple(map(int, p[k])) for k in ("window_dimensions", "window_strides"))
    w = Windows(eqn.shape, size, stride, dilation)
    return w, windowed(b, x, config, fill, w.places)


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
    """Each window starts from `init` (None: from nothing); what lies in the padding does not count."""
    w, x = windows(b, eqn, x, neutral(op, x.dtype))
    e = reduced(w, x, op)
    e = e if init is None else combine(op, init, e)
    return b.map(eqn.shape, eqn.dtype, rounded(e, eqn.dtype) if op in ("sum", "prod") else e)


@primitive("reduce_window_max", "reduce_window_min", "reduce_window_sum", empty=True)
def _known(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return _reduction(b, eqn, x, eqn.primitive.removeprefix("reduce_window_"))


@primitive("reduce_window", empty=True)
def _reduce_window(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    """By any function of scalars; one without a name is written out for every place of the window, and the padding
    holds its initial values, which are neutral elements."""
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
    out: Sequence[Tensor] = [b.map(eqn.shape, i.dtype, i.over(())) for i in inits]
    f = elementwise_calls(b, (jaxpr, consts) if consts else jaxpr, eqn.shape)
    for terms in zip(*columns, strict=True):
        out = f(out, terms)
    return out


# -------------------------------------------------------------------------------- one element of every window, and back


def _chosen(w: Windows, x: Tensor, inside: Tensor, largest: bool, follow: Sequence[Expr]) -> Expr:
    """Of each window, the entry of `follow` at the place of the first extreme element among those `inside` the tensor."""
    (best, known, out), *rest = zip(w.terms(x), w.terms(inside), follow, strict=True)
    for e, here, value in rest:
        ahead = E.binary("le", e, best) if largest else E.binary("le", best, e)
        stays = E.binary("or", E.unary("not", here), E.binary("and", known, ahead))
        best, out, known = E.select(stays, best, e), E.select(stays, out, value), E.binary("or", known, here)
    return out


def _extremes(b: Builder, eqn: Equation, x: Tensor, fill: Expr) -> tuple[Windows, Tensor, Tensor, bool]:
    """The windows of a `select_and_...`, its padded operand, where that holds elements, and whether the largest count."""
    name = eqn.params["select_prim"].name
    if name not in ("ge", "le"):
        b.unsupported(f"a selection by {name}")
    if math.prod(eqn.params["window_dimensions"]) > TERMS:
        b.unsupported(f"windows of more than {TERMS} elements")
    w, x_padded = windows(b, eqn, x, fill)
    _, inside = windows(b, eqn, Tensor(x.shape, "bool", splat=E.const(True, "bool")), E.const(False, "bool"))
    return w, x_padded, inside, name == "ge"


@primitive("select_and_gather_add")
def _select_and_gather(b: Builder, eqn: Equation, tangents: Tensor, x: Tensor) -> Tensor:
    """The tangent at the place of each window's (first) extreme; 0 where a window has no elements."""
    w, x, inside, largest = _extremes(b, eqn, x, E.const(0.0, "f32"))
    _, tangents = windows(b, eqn, tangents, E.const(0.0, "f32"))
    return b.map(eqn.shape, eqn.dtype, _chosen(w, x, inside, largest, w.terms(tangents)))


@primitive("select_and_scatter_add")
def _select_and_scatter(b: Builder, eqn: Equation, source: Tensor, x: Tensor) -> Tensor:
    """Each element of `source` added at the place of its window's extreme.

    Seen from a result: of the windows over it (stride by stride apart), those that chose it. So both the sources and the
    places that were chosen are spread out by the strides, and a window of the same size gathers them backwards.
    """
    inner = replace(eqn, outs=((source.shape, eqn.dtype),), live=(True,))
    w, padded_x, inside, largest = _extremes(b, inner, x, E.const(0, x.compute))
    numbers = [E.const(n, "i32") for n in range(w.places)]
    place = b.map(source.shape, "i32", _chosen(w, padded_x, inside, largest, numbers))
    config = []
    for n, o, k, s, (lo, _) in zip(x.shape, source.shape, w.size, w.stride, eqn.params["padding"], strict=True):
        before = k - 1 - lo
        config.append((before, n + k - 1 - ((o - 1) * s + 1) - before, s - 1))
    place = padded(b, place, config, E.const(-1, "i32"))
    source = padded(b, source, config, E.const(0, source.compute))
    back = Windows(eqn.shape, w.size, (1,) * len(w.size), (1,) * len(w.size))
    zero = E.const(0, source.compute)
    out = None
    for number, at, e in zip(reversed(numbers), back.terms(place), back.terms(source), strict=True):
        term = E.select(E.binary("eq", at, number), e, zero)
        out = term if out is None else E.binary("add", out, term)
    assert out is not None
    return b.map(eqn.shape, eqn.dtype, rounded(out, eqn.dtype))
