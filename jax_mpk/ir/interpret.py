"""The meaning of a graph, in NumPy: the oracle that passes and backends are tested against.

`run` executes a graph at any stage, operator by operator, each expression vectorised over the whole domain. Arrays
inside an operator have one dimension for every axis id that the operator mentions (extent 1 where an expression does
not depend on the axis), so that broadcasting does the rest. Values are kept in their types in memory, computed in
float32 and 32-bit integers, and rounded only where an expression says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from jax_mpk.ir import expr as E
from jax_mpk.ir import scalar
from jax_mpk.ir.expr import Acc, Binary, Const, Coord, Expr, Index, Load, Piece, Reduce, Select, Unary
from jax_mpk.ir.graph import (
    HEAD_AXIS,
    KEY_AXIS,
    Append,
    Attention,
    Contract,
    Graph,
    GraphError,
    Map,
    Op,
    Scan,
    Sort,
    Update,
    Value,
)
from jax_mpk.ir.text import coord_text

NUMPY_DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32), "i16": np.dtype(np.int16), "i8": np.dtype(np.int8), "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16), "u8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
}  # fmt: skip


def run(graph: Graph, args: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of `graph` on `args` (arrays of the shapes and dtypes of `graph.args`, which are left unchanged).

    Raises:
      GraphError: an argument does not fit, or an operator reads out of bounds or a value that was overwritten.
    """
    if len(args) != len(graph.args):
        raise GraphError(f"{len(graph.args)} arguments expected, {len(args)} given")
    data: dict[int, np.ndarray] = {}
    for i, v in graph.values.items():
        if v.role != "temp":
            array = np.asarray(args[v.index] if v.role == "arg" else v.data)
            if array.shape != v.shape or array.dtype != NUMPY_DTYPES[v.dtype]:
                raise GraphError(f"{v} does not fit {array.dtype}{list(array.shape)}")
            data[i] = array
    with np.errstate(all="ignore"):
        for op in graph.ops:
            _execute(graph, op, data)
    return [data[r] for r in graph.results]


def constant(e: Expr) -> np.ndarray:
    """The value of an expression without axes and loads."""
    with np.errstate(all="ignore"):
        return _Frame((), {}, {}, (e,)).eval(e)


# ----------------------------------------------------------------------------------------------------------- operators


def _execute(g: Graph, op: Op, data: dict[int, np.ndarray]) -> None:
    if isinstance(op, Map):
        _store(g, op, data, _Frame(op.domain, {}, data, (op.expr,)).full(op.expr, range(len(op.domain))))
    elif isinstance(op, Update):
        _append(g, op.append, op.domain, data)
    elif isinstance(op, Contract):
        _contract(g, op, data)
    elif isinstance(op, Attention):
        _attention(g, op, data)
    elif isinstance(op, Sort):
        _sort(g, op, data)
    elif isinstance(op, Scan):
        _scan(g, op, data)
    else:
        raise TypeError(type(op).__name__)


def _empty(v: Value) -> np.ndarray:
    """Poison: an element that no operator writes shows."""
    out = np.empty(v.shape, NUMPY_DTYPES[v.dtype])
    out.view(np.uint8).fill(0xFF) if v.shape else out.fill(np.asarray(-1).astype(out.dtype))
    return out


def _store(g: Graph, op: Op, data: dict[int, np.ndarray], x: np.ndarray) -> None:
    """Stores `x`, of the shape of the domain."""
    v = g.values[op.out]
    x = x.astype(NUMPY_DTYPES[v.dtype])
    if op.store is None:
        if x.shape != v.shape:
            raise GraphError(f"{v} is stored from a domain of shape {x.shape}")
        data[op.out] = x
        return
    frame = _Frame(x.shape, {}, data, ())
    out = _empty(v)
    out[tuple(frame.coord(c, {}) for c in op.store)] = x
    data[op.out] = out


def _append(g: Graph, a: Append, domain: tuple[int, ...], data: dict[int, np.ndarray]) -> None:
    extents = dict(zip(a.axes, a.window, strict=True))
    frame = _Frame(domain, extents, data, (a.expr, *(c.dyn for c in a.coords if c.dyn is not None)))
    v = g.values[a.out]
    x = frame.full(a.expr, a.axes).astype(NUMPY_DTYPES[v.dtype])
    where = []
    keep = np.ones(a.window, np.bool_)
    for c, n in zip(a.coords, v.shape, strict=True):
        at = frame.axes_only(frame.coord(c, {}, clamp=a.oob == "clamp"), a.axes)
        where.append(at)
        keep &= (at >= 0) & (at < n)
    if a.oob == "clamp" and not keep.all():
        raise GraphError(f"{v} is written out of bounds")
    out = data.pop(a.target).copy()
    index = tuple(np.broadcast_to(w, a.window)[keep] for w in where)
    if a.mode != "set":
        _COMBINE[a.mode].at(out, index, x[keep])
    else:
        out[index] = x[keep]
    data[a.out] = out


_COMBINE = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _contract(g: Graph, op: Contract, data: dict[int, np.ndarray]) -> None:
    frame = _Frame(op.domain, dict(op.k), data, (op.lhs, *op.rhs))
    lhs = frame.eval(op.lhs)
    accs = [frame.einsum(lhs, frame.eval(r), [a for a, _ in op.k]).astype(lhs.dtype) for r in op.rhs]
    domain = range(len(op.domain))
    accs = [np.broadcast_to(frame.axes_only(a, domain), op.domain) for a in accs]
    _store(g, op, data, _Frame(op.domain, {}, data, (op.epilogue,), accs).full(op.epilogue, domain))


def _attention(g: Graph, op: Attention, data: dict[int, np.ndarray]) -> None:
    for a in op.appends:
        batch = {x: op.domain[x] for x in range(len(op.domain))}
        if any(x in batch and batch[x] != n for x, n in zip(a.axes, a.window, strict=True)):
            raise GraphError(f"the window of {g.values[a.out]} does not run along with the domain")
        _append(g, a, op.domain, data)
    core = {HEAD_AXIS: op.head, KEY_AXIS: op.keys}
    exprs = tuple(op.exprs().values())

    def frame(accs: Sequence[np.ndarray] = ()) -> _Frame:
        return _Frame(op.domain, core, data, exprs, accs)

    f = frame()
    keys = f.place[KEY_AXIS]
    scores = f.einsum(f.eval(op.q), f.eval(op.k), [HEAD_AXIS])
    scores = frame([scores]).eval(op.score)
    if scores.shape[keys] != op.keys:
        scores = np.broadcast_to(scores, (*scores.shape[:keys], op.keys, *scores.shape[keys + 1 :]))
    if op.limit is not None:
        limit = np.clip(f.eval(op.limit), 1, op.keys)
        scores = np.where(f.axis(KEY_AXIS, {}) < limit, scores, np.float32(-np.inf))
    p = np.exp(scores - scores.max(axis=keys, keepdims=True))
    p = p / p.sum(axis=keys, keepdims=True, dtype=np.float32)
    p = frame([p]).eval(op.prob)
    if op.limit is not None:
        p = np.where(f.axis(KEY_AXIS, {}) < limit, p, np.float32(0))
    out = f.einsum(p, f.eval(op.v), [KEY_AXIS])
    _store(g, op, data, frame([out]).full(op.epilogue, range(len(op.domain))))


def _sort(g: Graph, op: Sort, data: dict[int, np.ndarray]) -> None:
    key = _Frame(op.domain, {}, data, (op.key,)).full(op.key, range(len(op.domain)))
    order = np.argsort(key[..., ::-1] if op.descending else key, axis=-1, kind="stable")
    if op.descending:  # the stable order of the mirrored row, mirrored
        order = key.shape[-1] - 1 - order[..., ::-1]
    order = order[..., : op.count]
    _store(g, op, data, order if op.payload == "indices" else np.take_along_axis(key, order, axis=-1))


def _scan(g: Graph, op: Scan, data: dict[int, np.ndarray]) -> None:
    domain = range(len(op.domain))
    row = np.moveaxis(_Frame(op.domain, {}, data, (op.element,)).full(op.element, domain), op.axis, -1)
    acc = scalar.scan(op.how, row[..., ::-1])[..., ::-1] if op.reverse else scalar.scan(op.how, row)
    acc = np.moveaxis(acc, -1, op.axis)
    _store(g, op, data, _Frame(op.domain, {}, data, (op.epilogue,), [acc]).full(op.epilogue, domain))


# --------------------------------------------------------------------------------------------------------- expressions

Scope = dict[int, tuple[int, int]]
"""Ranges (lo, hi) of bound axes, and of axes that a piece restricts. `_CLIP` marks lanes that are thrown away."""
_CLIP = -1


class _Frame:
    """The axes of an operator as dimensions of arrays, and the evaluation of expressions over them.

    Axes: the domain, `extra` (id to extent: core axes), and whatever the reductions in `exprs` bind.
    """

    def __init__(self, domain: tuple[int, ...], extra: dict[int, int], data: dict[int, np.ndarray],
                 exprs: Iterable[Expr], accs: Sequence[np.ndarray] = ()):  # fmt: skip
        bound = {a for e in exprs for x in E.walk(e) if isinstance(x, Reduce) for a in x.bound}
        self.extent = dict(enumerate(domain)) | extra
        order = [*range(len(domain)), *sorted((set(extra) | bound) - set(range(len(domain))))]
        self.place = {a: n for n, a in enumerate(order)}
        self.rank = len(order)
        self.data = data
        self.accs = [self._lift(a) for a in accs]
        self.memo: dict[Expr | tuple[Expr, tuple[tuple[int, tuple[int, int]], ...]], np.ndarray] = {}

    def _lift(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape + (1,) * (self.rank - x.ndim))

    def axis(self, a: int, scope: Scope) -> np.ndarray:
        """The index of axis `a` along its dimension."""
        lo, hi = scope[a] if a in scope else (0, self.extent[a])
        shape = [1] * self.rank
        shape[self.place[a]] = hi - lo
        return np.arange(lo, hi).reshape(shape)

    def coord(self, c: Coord, scope: Scope, clamp: bool = True) -> np.ndarray:
        """The value of a coordinate (int64); a dynamic one clamped as it says, unless told otherwise."""
        out = np.full((1,) * self.rank, c.const, np.int64)
        for t in c.terms:
            digit = self.axis(t.axis, scope) // t.div
            out = out + t.coef * (digit % t.mod if t.mod else digit)
        if c.dyn is not None:
            out = out + self.eval(c.dyn, scope).astype(np.int64)
            out = np.clip(out, 0, c.limit) if clamp else out
        return out

    def axes_only(self, x: np.ndarray, axes: Iterable[int]) -> np.ndarray:
        """`x` with the dimensions of `axes` only, in this order; all others have extent 1."""
        places = [self.place[a] for a in axes]
        rest = [p for p in range(self.rank) if p not in places]
        return x.transpose(*places, *rest).reshape([x.shape[p] for p in places])

    def full(self, e: Expr, axes: Iterable[int]) -> np.ndarray:
        """`e` at every point of `axes`, an array of their extents."""
        axes = tuple(axes)
        return np.broadcast_to(self.axes_only(self.eval(e), axes), [self.extent[a] for a in axes])

    def einsum(self, x: np.ndarray, y: np.ndarray, summed: Sequence[int]) -> np.ndarray:
        """The sum of `x * y` over the axes `summed`, which keep a dimension of extent 1."""
        places = [self.place[a] for a in summed]
        shape = list(x.shape)
        for a, p in zip(summed, places, strict=True):
            shape[p] = self.extent[a]
        x = np.broadcast_to(x, shape)
        dims_x, dims_y = ([p for p in range(self.rank) if t.shape[p] != 1] for t in (x, y))
        keep = [p for p in range(self.rank) if p not in places and (p in dims_x or p in dims_y)]
        out: np.ndarray = np.einsum(x.reshape([n for n in x.shape if n != 1]), dims_x,
                                    y.reshape([n for n in y.shape if n != 1]), dims_y, keep, optimize=True)  # fmt: skip
        full = np.ones(self.rank, np.int64)
        full[keep] = out.shape
        return out.reshape(full)

    def eval(self, e: Expr, scope: Scope | None = None) -> np.ndarray:
        """`e` as an array of `rank` dimensions."""
        scope = scope or {}
        key = (e, tuple((a, r) for a, r in scope.items() if a in e.axes or a == _CLIP)) if scope else e
        hit = self.memo.get(key)
        if hit is None:
            hit = np.asarray(self._eval(e, scope))
            self.memo[key] = hit
        return hit

    def _eval(self, e: Expr, scope: Scope) -> np.ndarray:
        if isinstance(e, Const):
            return np.full((1,) * self.rank, e.value, NUMPY_DTYPES[e.dtype])
        if isinstance(e, Index):
            return self.coord(e.coord, scope).astype(np.int32)
        if isinstance(e, Load):
            return self._load(e, scope).astype(NUMPY_DTYPES[e.dtype], copy=False)
        if isinstance(e, Unary):
            return scalar.unary(e.op, self.eval(e.a, scope))
        if isinstance(e, Binary):
            return scalar.binary(e.op, self.eval(e.a, scope), self.eval(e.b, scope))
        if isinstance(e, Select):
            return np.where(self.eval(e.cond, scope), self.eval(e.a, scope), self.eval(e.b, scope))
        if isinstance(e, Piece):
            return self._piece(e, scope)
        if isinstance(e, Reduce):
            return self._reduce(e, scope)
        if isinstance(e, Acc):
            return self.accs[e.index]
        raise TypeError(type(e).__name__)

    def _load(self, e: Load, scope: Scope) -> np.ndarray:
        array = self.data.get(e.value)
        if array is None:
            raise GraphError(f"%{e.value} is read before it is written or after it was overwritten")
        if _CLIP not in scope:
            window = self._window(e, array, scope)
            if window is not None:
                return window
        where = []
        for c, n in zip(e.coords, array.shape, strict=True):
            at = self.coord(c, scope)
            at = np.clip(at, 0, n - 1) if _CLIP in scope else at
            if at.size and (at.min() < 0 or at.max() >= n):
                raise GraphError(f"%{e.value} is read at {coord_text(c, str)}, outside 0..{n - 1}")
            where.append(at)
        return array[tuple(where)] if where else array.reshape((1,) * self.rank)

    def _window(self, e: Load, array: np.ndarray, scope: Scope) -> np.ndarray | None:
        """The load as a slice, when every coordinate is a constant or an axis of its own."""
        slices: list[slice] = []
        order: list[int | None] = []
        for c, n in zip(e.coords, array.shape, strict=True):
            t = c.terms[0] if c.terms else None
            if c.dyn is not None or len(c.terms) > 1 or (t and (t.coef != 1 or t.div != 1 or t.mod or t.axis in order)):
                return None
            lo, hi = (scope.get(t.axis) or (0, self.extent[t.axis])) if t else (0, 1)
            if lo + c.const < 0 or hi + c.const > n:
                raise GraphError(f"%{e.value} is read at {coord_text(c, str)}, outside 0..{n - 1}")
            slices.append(slice(lo + c.const, hi + c.const))
            order.append(t.axis if t else None)
        part = array[tuple(slices)]
        shape = [1] * self.rank
        for a, n in zip(order, part.shape, strict=True):
            if a is not None:
                shape[self.place[a]] = n
        dims = sorted(range(len(order)), key=lambda d: -1 if order[d] is None else self.place[order[d]])
        return part.transpose(dims).reshape(shape)

    def _piece(self, e: Piece, scope: Scope) -> np.ndarray:
        """Each part over its own range of the axis; where the coordinate is no plain axis, over everything."""
        t = e.coord.terms[0] if len(e.coord.terms) == 1 else None
        if t is None or t.coef != 1 or t.div != 1 or t.mod or _CLIP in scope:
            at = self.coord(e.coord, scope)
            out = self.eval(e.parts[0], {**scope, _CLIP: (0, 0)})
            for bound, part in zip(e.bounds[1:-1], e.parts[1:], strict=True):
                out = np.where(at < bound, out, self.eval(part, {**scope, _CLIP: (0, 0)}))
            return out
        lo, hi = scope.get(t.axis) or (0, self.extent[t.axis])
        arrays = []
        for part, a, b in zip(e.parts, e.bounds[:-1], e.bounds[1:], strict=True):
            a, b = max(a - e.coord.const, lo), min(b - e.coord.const, hi)
            if a < b:
                x = self.eval(part, {**scope, t.axis: (a, b)})
                shape = list(x.shape)
                shape[self.place[t.axis]] = b - a
                arrays.append(np.broadcast_to(x, shape))
        shapes = np.max([x.shape for x in arrays], axis=0)
        p = self.place[t.axis]
        arrays = [np.broadcast_to(x, (*shapes[:p], x.shape[p], *shapes[p + 1 :])) for x in arrays]
        out = np.concatenate(arrays, axis=p)
        if out.shape[p] != hi - lo:
            raise GraphError(f"a concatenation covers {out.shape[p]} of {hi - lo} indices")
        return out

    def _reduce(self, e: Reduce, scope: Scope) -> np.ndarray:
        inner = {**scope, **{a: (0, n) for a, n in zip(e.bound, e.extents, strict=True)}}
        x = self.eval(e.body, inner)
        shape = list(x.shape)
        for a, n in zip(e.bound, e.extents, strict=True):
            shape[self.place[a]] = n
        x = np.broadcast_to(x, shape)
        return scalar.reduce(e.op, x, tuple(self.place[a] for a in e.bound))
