"""Sorting: rows are sorted by one key at a time, everything else follows by its positions."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mpk.frontend.arithmetic import total_order
from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import primitive
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import Sort


def _row_last(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def _key_coords(shape: tuple[int, ...], axis: int) -> list[Coord]:
    """Coordinates of a tensor of `shape` at a point of the domain with the sorted axis last."""
    domain = _row_last(shape, axis)
    coords = list(identity(domain))
    return [*coords[:axis], coords[-1], *coords[axis:-1]]


def _sort(b: Builder, key: Expr, shape: tuple[int, ...], axis: int, dtype: str, payload: str, count: int,
          descending: bool = False) -> Tensor:  # fmt: skip
    """A sort of rows along `axis` of a space of `shape`; the result has the sorted axis in its own place."""
    domain = _row_last(shape, axis)
    result = (*shape[:axis], count, *shape[axis + 1 :])
    out = b.value(result, dtype)
    store = tuple(_key_coords(shape, axis)) if axis != len(shape) - 1 else None
    b.emit(Sort(out, domain, b.source, store, key=key, payload=payload, descending=descending, count=count))
    return Tensor(result, dtype, out)


def _ordered(x: Tensor, coords: Sequence[Coord]) -> Expr:
    """The key of an element: f32, or i32 of the same order."""
    e = x.at(coords)
    if e.dtype == "u32":
        e = E.unary("u2i", E.binary("xor", e, E.const(1 << 31, "u32")))
    return converted(e, "bool", "i32") if e.dtype == "bool" else e


def _follow(b: Builder, x: Tensor, positions: Tensor, axis: int) -> Tensor:
    """`x` in the order of `positions` along `axis`."""
    coords = list(identity(positions.shape))
    row = positions.at(coords)
    coords[axis] = Coord(0, (), row, x.shape[axis] - 1)
    return b.map(positions.shape, x.dtype, x.at(coords))


@primitive("sort")
def _sort_rule(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    """Stable and ascending, NaN last; several keys are sorted by from the last to the first."""
    axis, keys = eqn.params["dimension"], eqn.params["num_keys"]
    xs = tuple(b.materialise(x) for x in xs)
    shape, n = xs[0].shape, xs[0].shape[axis]
    if n == 1:
        return xs
    coords = _key_coords(shape, axis)
    if len(xs) == 1 and xs[0].dtype in ("f32", "bf16", "f16", "i32", "i16", "i8"):
        return [_sort(b, xs[0].at(coords), shape, axis, xs[0].dtype, "values", n)]
    positions: Tensor | None = None
    for x in reversed(xs[:keys]):
        key = x if positions is None else _follow(b, x, positions, axis)
        order = _sort(b, _ordered(key, coords), shape, axis, "i32", "indices", n)
        positions = order if positions is None else _follow(b, positions, order, axis)
    assert positions is not None
    return [_follow(b, x, positions, axis) if on else x for x, on in zip(xs, eqn.live, strict=True)]


@primitive("top_k")
def _top_k(b: Builder, eqn: Equation, x: Tensor) -> Sequence[Tensor]:
    """Values and positions of the `k` largest; floats in their total order (NaN above infinity, 0 above -0)."""
    return _extremes(b, x, eqn.params.get("axis", -1), eqn.params["k"])


@primitive("approx_top_k")
def _approx_top_k(b: Builder, eqn: Equation, x: Tensor) -> Sequence[Tensor]:
    """The exact ones, sorted, as many as the result has."""
    p = eqn.params
    axis = p["reduction_dimension"] % len(x.shape)
    return _extremes(b, x, axis, eqn.shape[axis], largest=p["is_max_k"])


def _extremes(b: Builder, x: Tensor, axis: int, count: int, largest: bool = True) -> Sequence[Tensor]:
    """The `count` largest (or smallest) elements along `axis`, and their positions."""
    axis %= len(x.shape)
    x = b.materialise(x)
    key = _ordered(x, _key_coords(x.shape, axis))
    key = total_order(key) if key.dtype == "f32" else key
    key = key if largest else E.unary("not", key)
    positions = _sort(b, key, x.shape, axis, "i32", "indices", count, descending=True)
    return [_follow(b, x, positions, axis), positions]
