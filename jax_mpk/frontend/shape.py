"""Index maps: the shape of a tensor changes, its elements do not. Each is a map of one load; fusion removes them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import primitive
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Term
from jax_mpk.ir.graph import compute_dtype


def common_groups(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """The finest shape of which both shapes are splits (equal sizes): (2, 3, 4) and (6, 2, 2) give (6, 4)."""
    ends = set(itertools.accumulate(old, operator.mul)) & set(itertools.accumulate(new, operator.mul))
    sizes = sorted(ends - {1})
    return tuple(b // a for a, b in zip([1, *sizes], sizes, strict=False))


def reshaped(b: Builder, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` in row-major order as `shape`.

    Usually an index map over the new shape. Where a new extent is no multiple or divisor of an old one, like (2, 3) to
    (3, 2), the loop runs over the flattened groups that both have in common, and both sides are digits of it.
    """
    if x.splat is not None or x.shape == shape:
        return Tensor(shape, x.dtype, x.value, x.splat)
    coords = E.reshape_coords(identity(shape), shape, x.shape)
    if coords is not None:
        return b.map(shape, x.dtype, x.at(coords))
    groups = common_groups(x.shape, shape)
    flat = identity(groups)
    source, store = E.reshape_coords(flat, groups, x.shape), E.reshape_coords(flat, groups, shape)
    assert source is not None and store is not None
    return b.map(shape, x.dtype, x.at(source), domain=groups, store=store)


@primitive("reshape", moves=True)
def _reshape(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    order = eqn.params.get("dimensions")
    return reshaped(b, x if order is None else transposed(b, x, order), eqn.shape)


@primitive("squeeze", "expand_dims", moves=True)
def _squeeze(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return reshaped(b, x, eqn.shape)


@primitive(
    "copy", "copy_p", "stop_gradient", "name", "mesh_cast", "pvary", "optimization_barrier", "pbroadcast", empty=True
)
def _identity(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    return xs


@primitive("sharding_constraint", "reshard", "device_put")
def _placed(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    b.unplaced()
    return xs


@primitive("broadcast_in_dim", moves=True)
def _broadcast(b: Builder, eqn: Equation, x: Tensor, *dynamic: Tensor) -> Tensor:
    if dynamic:
        b.unsupported("a dynamic shape")
    axes = identity(eqn.shape)
    dims = eqn.params["broadcast_dimensions"]
    coords = [axes[d] if n != 1 else E.coord_const(0) for d, n in zip(dims, x.shape, strict=False)]
    return b.map(eqn.shape, eqn.dtype, x.at(coords))


@primitive("transpose", moves=True)
def _transpose(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return transposed(b, x, eqn.params["permutation"])


def transposed(b: Builder, x: Tensor, order: Sequence[int]) -> Tensor:
    """`x` with dimension `order[d]` as dimension d."""
    shape = tuple(x.shape[d] for d in order)
    coords = list(identity(shape))
    for new, old in enumerate(order):
        coords[old] = identity(shape)[new]
    return b.map(shape, x.dtype, x.at(coords))


@primitive("slice", moves=True)
def _slice(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    p = eqn.params
    return sliced(b, x, p["start_indices"], p["limit_indices"], p["strides"])


def sliced(b: Builder, x: Tensor, start: Sequence[int], limit: Sequence[int],
           step: Sequence[int] | None = None) -> Tensor:  # fmt: skip
    """`x[start:limit:step]`, with one entry a dimension."""
    start, limit, step = (tuple(map(int, x)) for x in (start, limit, step or (1,) * len(start)))  # JAX has NumPy's, too
    shape = tuple(-((s - e) // k) for s, e, k in zip(start, limit, step, strict=True))
    if shape == x.shape:
        return x
    coords = list(identity(shape))
    for d, (s, k) in enumerate(zip(start, step, strict=True)):
        coords[d] = E.coord_add(E.coord_scale(coords[d], k), E.coord_const(s))
    return b.map(shape, x.dtype, x.at(coords))


def pick(b: Builder, x: Tensor, axis: int, n: int) -> Tensor:
    """`x` at index `n` of `axis`, without that axis."""
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    coords = list(identity(shape))
    coords.insert(axis, E.coord_const(n))
    return b.map(shape, x.dtype, x.at(coords))


@primitive("split", moves=True)
def _split(b: Builder, eqn: Equation, x: Tensor) -> Sequence[Tensor]:
    out, at, axis = [], 0, eqn.params["axis"]
    for n in eqn.params["sizes"]:
        start, limit = [0] * len(x.shape), list(x.shape)
        start[axis], limit[axis] = at, at + int(n)
        out.append(sliced(b, x, start, limit))
        at += int(n)
    return out


@primitive("unstack", moves=True)
def _unstack(b: Builder, eqn: Equation, x: Tensor) -> Sequence[Tensor]:
    axis = eqn.params["axis"]
    return [pick(b, x, axis, n) for n in range(x.shape[axis])]


def joined(b: Builder, parts: Sequence[tuple[Expr, int]], axis: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The concatenation of (expression over the whole, extent along `axis`)."""
    bounds = (0, *itertools.accumulate(n for _, n in parts))
    return b.map(shape, dtype, E.piece(identity(shape)[axis], bounds, tuple(e for e, _ in parts)))


@primitive("concatenate", moves=True, empty=True)
def _concatenate(b: Builder, eqn: Equation, *xs: Tensor) -> Tensor:
    axis, at, parts = eqn.params["dimension"], 0, []
    for x in xs:
        if 0 in x.shape:
            continue
        coords = list(identity(eqn.shape))
        coords[axis] = _shifted(coords[axis], at, x.shape[axis])
        parts.append((x.at(coords), x.shape[axis]))
        at += x.shape[axis]
    return joined(b, parts, axis, eqn.shape, eqn.dtype)


def _shifted(c: Coord, start: int, extent: int) -> Coord:
    """`c - start` inside a piece of `extent`."""
    return E.coord_add(c, E.coord_const(-start)) if extent > 1 else E.coord_const(0)


@primitive("stack", moves=True)
def _stack(b: Builder, eqn: Equation, *xs: Tensor) -> Tensor:
    return stacked(b, xs, eqn.params["axis"])


def stacked(b: Builder, xs: Sequence[Tensor], axis: int) -> Tensor:
    """The tensors side by side along a new axis."""
    shape = (*xs[0].shape[:axis], len(xs), *xs[0].shape[axis:])
    coords = identity(shape)
    inner = coords[:axis] + coords[axis + 1 :]
    return joined(b, [(x.at(inner), 1) for x in xs], axis, shape, xs[0].dtype)


@primitive("tile", moves=True)
def _tile(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    coords = list(identity(eqn.shape))
    for d, (n, r) in enumerate(zip(x.shape, eqn.params["reps"], strict=True)):
        if r > 1:
            coords[d] = Coord(0, (Term(1, d, 1, n, n),)) if n > 1 else E.coord_const(0)
    return b.map(eqn.shape, eqn.dtype, x.at(coords))


@primitive("rev", moves=True)
def _rev(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    coords = list(identity(eqn.shape))
    for d in eqn.params["dimensions"]:
        coords[d] = E.coord_add(E.coord_scale(coords[d], -1), E.coord_const(x.shape[d] - 1))
    return b.map(eqn.shape, eqn.dtype, x.at(coords))


@primitive("iota")
def _iota(b: Builder, eqn: Equation) -> Tensor:
    e = E.index(identity(eqn.shape)[eqn.params["dimension"]])
    return b.map(eqn.shape, eqn.dtype, converted(e, "i32", eqn.dtype))


@primitive("empty", "empty2")
def _empty(b: Builder, eqn: Equation) -> Tensor:
    """Any values will do; zeros are the same ones each time."""
    return b.map(eqn.shape, eqn.dtype, E.const(0, compute_dtype(eqn.dtype)))


@primitive("pad", empty=True)
def _pad(b: Builder, eqn: Equation, x: Tensor, filler: Tensor) -> Tensor:
    return padded(b, x, eqn.params["padding_config"], filler.over(()))


def padded(b: Builder, x: Tensor, config: Sequence[tuple[int, int, int]], fill: Expr) -> Tensor:
    """`x` with fillers: `config` has (before, after, between neighbours) a dimension.

    Interior padding first, as a map of its own; then each edge is a piece. A negative edge cuts.
    """
    config = [(int(before), int(after), int(between)) for before, after, between in config]
    if any(inner and n > 1 for (_, _, inner), n in zip(config, x.shape, strict=True)):
        x = _dilated(b, x, [inner + 1 for _, _, inner in config], fill)
    shape = tuple(lo + n + hi for (lo, hi, _), n in zip(config, x.shape, strict=True))
    if not any(lo or hi for lo, hi, _ in config):
        return x
    coords = [E.coord_add(c, E.coord_const(-lo)) for c, (lo, _, _) in zip(identity(shape), config, strict=True)]
    spans = [(max(lo, 0), min(lo + n, m)) for (lo, _, _), n, m in zip(config, x.shape, shape, strict=True)]
    if any(a >= z for a, z in spans):
        return b.map(shape, x.dtype, fill)
    for d, (a, z) in enumerate(spans):
        coords[d] = coords[d] if z - a > 1 else E.coord_const(a - config[d][0])
    body = x.at(coords)
    for axis, (a, z), m in zip(itertools.count(), spans, shape, strict=False):
        bounds = [n for n, keep in ((0, a > 0), (a, True), (z, z < m), (m, True)) if keep]
        parts = [fill] * (a > 0) + [body] + [fill] * (z < m)
        body = E.piece(identity(shape)[axis], tuple(bounds), tuple(parts))
    return b.map(shape, x.dtype, body)


def _dilated(b: Builder, x: Tensor, steps: Sequence[int], fill: Expr) -> Tensor:
    """`x` with `step - 1` fillers between neighbours."""
    shape = tuple((n - 1) * k + 1 for n, k in zip(x.shape, steps, strict=True))
    coords = list(identity(shape))
    hit: Expr | None = None
    for d, (n, k) in enumerate(zip(x.shape, steps, strict=True)):
        if k > 1 and n > 1:
            coords[d] = Coord(0, (Term(1, d, k, 0, n),))
            own = E.binary("eq", E.index(Coord(0, (Term(1, d, 1, k, k),))), E.const(0, "i32"))
            hit = own if hit is None else E.binary("and", hit, own)
    assert hit is not None  # it is only asked for where something comes between
    return b.map(shape, x.dtype, E.select(hit, x.at(coords), fill))
