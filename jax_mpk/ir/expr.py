"""Scalar expressions over an iteration domain: the language of prologues, epilogues and index maps.

An `Expr` is the value of a tensor at one point of a domain. Domain axes are small integers (`0 .. rank-1`). A tensor
is read by `Load(value, coords)`; every coordinate is a `Coord`, a quasi-affine function of the axes plus, for data-
dependent indexing, a dynamic integer expression. Reshape, transpose, slice, broadcast and concatenate are therefore
no operations at all: they are coordinates (and `Piece` for concatenate), and fusing two operators is substitution.

Expressions are immutable and interned: structural equality is identity (`is`), so common subexpressions are shared
and dictionaries keyed by expressions are cheap. The approach is that of tensor comprehensions (Halide, TVM's TE).

Semantics of arithmetic: floats are computed in float32; a result of a narrower float type is rounded by an explicit
`Unary("round_bf16" | "round_f16")`, so that fusing never changes a bit. Integers are 32-bit two's complement, booleans
are 0/1 integers. `dtype` of an expression is one of "f32", "i32", "u32", "bool"; bf16/f16/i8/... exist only in memory
(a `Load` widens, a store narrows).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

from jax_mpk.ir.coord import (  # noqa: F401  (the vocabulary of index maps is part of the vocabulary of expressions)
    CORE_AXIS,
    REDUCE_AXIS,
    UNKNOWN,
    Coord,
    Ranges,
    Term,
    collect,
    coord_add,
    coord_axis,
    coord_const,
    coord_range,
    coord_scale,
    coord_split,
    reshape_coords,
    restrict,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- expressions

UNARY = (
    "neg abs exp exp2 expm1 log log1p sqrt rsqrt cbrt tanh sin cos tan logistic erf sign floor ceil round_even "
    "round_away not is_finite round_bf16 round_f16 f2i f2u i2f u2f i2u u2i bitcast_i2f bitcast_f2i wrap_i8 "
    "wrap_u8 wrap_i16 wrap_u16 i2b f2b popcount clz"
).split()
"""`f2i`, `f2u` truncate and saturate; `i2b`/`f2b` test for non-zero; `i2u`, `u2i` keep the bits; `wrap_*` keep
the low bits of an integer."""
BINARY = "add sub mul div rem max min pow atan2 and or xor shl shr sar lt le eq ne".split()
"""Operands have one type (`pow` also f32 ** i32). Comparisons give bool; `sar` is the arithmetic shift, `shr` the logical.
`max` and `min` of floats give NaN when one operand is NaN. Integer division by zero gives -1 (all ones), the remainder
the dividend; a shift by 32 or more gives 0 (`sar`: the sign)."""
REDUCE = "sum max min prod and or argmax argmin".split()
"""argmax/argmin give the i32 index of the first extreme along their single axis (a NaN counts as the extreme)."""
_UNARY, _BINARY = frozenset(UNARY), frozenset(BINARY)
_COMPARE = frozenset(("lt", "le", "eq", "ne"))
EXPENSIVE = frozenset("exp exp2 expm1 log log1p tanh sin cos tan logistic erf pow atan2 cbrt".split())
Key = tuple[object, ...]
"""What a node is interned by: its class, then what tells it from others of that class."""


class Expr:
    """Base class. Interned: build nodes with the functions below, compare them with `is`.

    Attributes: `dtype` ("f32" | "i32" | "u32" | "bool"); `axes`, the free axes; `loads`, the ids of the values read;
    `height`, the nesting depth of reductions (0 = none); `cost`, work per point (a transcendental counts 8).
    What is asked of a node again and again is kept in it: `simple` (see `ir.algebra`), and what `walk` and
    `walk_loads` find, without the node itself (a reference cycle would outlive its last use).
    """

    __slots__ = ("__weakref__", "_below", "_reads", "axes", "cost", "dtype", "height", "key", "loads", "simple")
    _table: ClassVar[weakref.WeakValueDictionary[Key, Any]] = weakref.WeakValueDictionary()  # a node of the key's class
    key: Key
    dtype: str
    axes: frozenset[int]
    loads: frozenset[int]
    height: int
    cost: float
    simple: Expr | None
    _below: tuple[Expr, ...] | None
    _reads: tuple[tuple[Load, Ranges], ...] | None

    def args(self) -> tuple[Expr, ...]:
        return ()

    def __repr__(self) -> str:
        from jax_mpk.ir.text import to_text

        return to_text(self)


_known: Callable[[Key], Callable[[], Any] | None] = vars(Expr._table)["data"].get
"""A third of the time of `_table.get`, and most nodes are known."""


N = TypeVar("N", bound=Expr)


def _intern(cls: type[N], key: Key, init: Callable[[N], None]) -> N:
    full = (cls, *key)
    ref = _known(full)
    node: N | None = ref() if ref is not None else None
    if node is None:
        node = object.__new__(cls)
        node.key = full
        node.simple = node._below = node._reads = None
        init(node)
        node = Expr._table.setdefault(full, node)
    return node


def _facts(node: Expr, parts: Iterable[Expr], cost: float) -> None:
    axes: frozenset[int] = frozenset()
    loads: frozenset[int] = frozenset()
    height = 0
    for p in parts:
        axes |= p.axes
        loads |= p.loads
        height = max(height, p.height)
        cost += p.cost
    node.axes, node.loads, node.height, node.cost = axes, loads, height, cost


class Const(Expr):
    """A literal; `value` is a Python float (that is a float32), int or bool."""

    __slots__ = ("value",)
    value: float | int | bool


class Index(Expr):
    """The i32 value of a static coordinate (iota and everything made of it)."""

    __slots__ = ("coord",)
    coord: Coord


class Load(Expr):
    """One element of the value `value` at `coords` (one `Coord` a dimension). bf16, i8, ... widen exactly."""

    __slots__ = ("coords", "value")
    value: int
    coords: tuple[Coord, ...]

    def args(self) -> tuple[Expr, ...]:
        return tuple(c.dyn for c in self.coords if c.dyn is not None)


class Unary(Expr):
    __slots__ = ("a", "op")
    op: str
    a: Expr

    def args(self) -> tuple[Expr, ...]:
        return (self.a,)


class Binary(Expr):
    __slots__ = ("a", "b", "op")
    op: str
    a: Expr
    b: Expr

    def args(self) -> tuple[Expr, ...]:
        return (self.a, self.b)


class Select(Expr):
    """`a if cond else b`; both sides must be safe to evaluate."""

    __slots__ = ("a", "b", "cond")
    cond: Expr
    a: Expr
    b: Expr

    def args(self) -> tuple[Expr, ...]:
        return (self.cond, self.a, self.b)


class Piece(Expr):
    """Concatenation: `parts[j]` where `bounds[j] <= coord < bounds[j+1]`. Only the selected part is evaluated.

    `bounds` has one entry more than `parts`; the parts use the axes of the whole, already shifted.
    """

    __slots__ = ("bounds", "coord", "parts")
    coord: Coord
    bounds: tuple[int, ...]
    parts: tuple[Expr, ...]

    def args(self) -> tuple[Expr, ...]:
        return self.parts


class Reduce(Expr):
    """`op` over the bound axes `bound` (ids from `reduce_axes`) of `extents`; combined in index order.

    The ids are canonical (a function of the body's height), so equal reductions are one node.
    """

    __slots__ = ("body", "bound", "extents", "op")
    op: str
    body: Expr
    bound: tuple[int, ...]
    extents: tuple[int, ...]

    def args(self) -> tuple[Expr, ...]:
        return (self.body,)


class Acc(Expr):
    """The result number `index` of the core (contraction or score), inside its epilogue. Of the type of what is summed."""

    __slots__ = ("index",)
    index: int


def const(value: float | int | bool, dtype: str) -> Const:
    value = ctypes.c_float(value).value if dtype == "f32" else bool(value) if dtype == "bool" else int(value)
    tag = repr(value)  # tells 0.0 from -0.0, and keeps NaN equal to itself

    def init(n: Const) -> None:
        n.value, n.dtype = value, dtype
        _facts(n, (), 0)

    return _intern(Const, (dtype, tag), init)


def index(coord: Coord) -> Expr:
    if coord.dyn is not None:
        raise ValueError("an index expression takes a static coordinate")
    if coord.is_const:
        return const(coord.const, "i32")

    def init(n: Index) -> None:
        n.coord, n.dtype = coord, "i32"
        _facts(n, (), 1)
        n.axes = coord.axes()

    return _intern(Index, (coord,), init)


def coord_value(coord: Coord) -> Expr:
    """The i32 value of any coordinate, dynamic ones included (clamped, as a load would clamp them)."""
    if coord.dyn is None:
        return index(coord)
    static = Coord(coord.const, coord.terms)
    full = coord.dyn if static == Coord() else binary("add", index(static), coord.dyn)
    return binary("max", binary("min", full, const(coord.limit, "i32")), const(0, "i32"))


def load(value: int, coords: tuple[Coord, ...], dtype: str) -> Load:
    coords = tuple(coords)

    def init(n: Load) -> None:
        n.value, n.coords, n.dtype = value, coords, dtype
        _facts(n, [c.dyn for c in coords if c.dyn is not None], 1)
        for c in coords:
            n.axes = n.axes | c.axes()
        n.loads = n.loads | {value}

    return _intern(Load, (value, coords, dtype), init)


_UNARY_DTYPE = dict(f2i="i32", f2u="u32", i2f="f32", u2f="f32", i2u="u32", u2i="i32", bitcast_i2f="f32",
                    bitcast_f2i="i32", i2b="bool", f2b="bool", is_finite="bool")  # fmt: skip


def unary(op: str, a: Expr) -> Expr:
    if op not in _UNARY:
        raise ValueError(f"unknown unary operation {op!r}")
    if op.startswith("round_") and isinstance(a, Unary) and a.op == op:
        return a  # rounding is idempotent

    def init(n: Unary) -> None:
        n.op, n.a, n.dtype = op, a, _UNARY_DTYPE.get(op, a.dtype)
        _facts(n, (a,), 8 if op in EXPENSIVE else 1)

    return _intern(Unary, (op, id(a)), init)


def binary(op: str, a: Expr, b: Expr) -> Expr:
    if op not in _BINARY:
        raise ValueError(f"unknown binary operation {op!r}")

    def init(n: Binary) -> None:
        n.op, n.a, n.b = op, a, b
        n.dtype = "bool" if op in _COMPARE else a.dtype
        _facts(n, (a, b), 8 if op in EXPENSIVE else 1)

    return _intern(Binary, (op, id(a), id(b)), init)


def select(cond: Expr, a: Expr, b: Expr) -> Expr:
    if a is b:
        return a
    if isinstance(cond, Const):
        return a if cond.value else b

    def init(n: Select) -> None:
        n.cond, n.a, n.b, n.dtype = cond, a, b, a.dtype
        _facts(n, (cond, a, b), 1)

    return _intern(Select, (id(cond), id(a), id(b)), init)


def piece(coord: Coord, bounds: tuple[int, ...], parts: tuple[Expr, ...]) -> Expr:
    if coord.dyn is not None:
        raise NotAffine("a concatenation indexed by a dynamic coordinate")
    lo, hi = coord.min, coord.max
    live = [j for j in range(len(parts)) if bounds[j] <= hi and bounds[j + 1] > lo]
    if len(live) <= 1:  # none: a place that a concatenation around this one never takes
        return parts[live[0] if live else 0]
    bounds, parts = tuple(bounds[live[0] : live[-1] + 2]), tuple(parts[j] for j in live)

    def init(n: Piece) -> None:
        n.coord, n.bounds, n.parts, n.dtype = coord, bounds, parts, parts[0].dtype
        _facts(n, parts, 1)
        n.cost = 1 + max(p.cost for p in parts)
        n.axes = n.axes | coord.axes()

    return _intern(Piece, (coord, bounds, tuple(id(p) for p in parts)), init)


def reduce_axes(height: int, count: int) -> tuple[int, ...]:
    """The canonical ids bound by a reduction over `count` axes whose body has reductions nested `height` deep."""
    return tuple(REDUCE_AXIS + 8 * height + j for j in range(count))


def reduce(op: str, body: Expr, bound: tuple[int, ...], extents: tuple[int, ...]) -> Reduce:
    """`op` over the axes `bound` of `body` (any ids: they are renamed to the canonical ones)."""
    if op not in REDUCE:
        raise ValueError(f"unknown reduction {op!r}")
    if op in ("argmax", "argmin") and len(bound) != 1:
        raise ValueError(f"{op} takes one axis")
    height, free = body.height, body.axes.difference(bound)
    canon = reduce_axes(height, len(bound))
    while not free.isdisjoint(canon):  # an axis of an enclosing reduction: do not capture it
        height += 1
        canon = reduce_axes(height, len(bound))
    if tuple(bound) != canon:
        body = substitute_axes(body, {a: coord_axis(c, e) for a, c, e in zip(bound, canon, extents, strict=True)})

    def init(n: Reduce) -> None:
        n.op, n.body, n.bound, n.extents = op, body, canon, tuple(extents)
        n.dtype = "i32" if op.startswith("arg") else body.dtype
        n.axes, n.loads = body.axes - frozenset(canon), body.loads
        n.height, n.cost = height + 1, 1 + (1 + body.cost) * math.prod(extents)

    return _intern(Reduce, (op, id(body), canon, tuple(extents)), init)


def acc(index_: int = 0, axes: Iterable[int] = (), dtype: str = "f32") -> Acc:
    """The core's accumulator `index_` at the current point; `axes` are the domain axes that it depends on."""
    axes = frozenset(axes)

    def init(n: Acc) -> None:
        n.index, n.dtype = index_, dtype
        _facts(n, (), 1)
        n.axes = axes

    return _intern(Acc, (index_, axes, dtype), init)


# ---------------------------------------------------------------------------------------------------------- substitution


Rewrite = Callable[[Expr], Expr]
Move = Callable[[Coord], Coord]


def rebuild(e: Expr, f: Rewrite, g: Move) -> Expr:
    """`e` with `f` applied to its sub-expressions and `g` to its coordinates (both already transformed by the caller)."""
    return _REBUILD[type(e)](e, f, g)


def _rebuild_index(e: Index, f: Rewrite, g: Move) -> Expr:
    c = g(e.coord)
    return e if c is e.coord else coord_value(c)


def _rebuild_load(e: Load, f: Rewrite, g: Move) -> Expr:
    coords = tuple([g(c) for c in e.coords])
    return e if coords == e.coords else load(e.value, coords, e.dtype)


def _rebuild_unary(e: Unary, f: Rewrite, g: Move) -> Expr:
    a = f(e.a)
    return e if a is e.a else unary(e.op, a)


def _rebuild_binary(e: Binary, f: Rewrite, g: Move) -> Expr:
    a, b = f(e.a), f(e.b)
    return e if a is e.a and b is e.b else binary(e.op, a, b)


def _rebuild_select(e: Select, f: Rewrite, g: Move) -> Expr:
    cond, a, b = f(e.cond), f(e.a), f(e.b)
    return e if cond is e.cond and a is e.a and b is e.b else select(cond, a, b)


def _rebuild_piece(e: Piece, f: Rewrite, g: Move) -> Expr:
    coord, parts = g(e.coord), tuple([f(p) for p in e.parts])
    return e if coord is e.coord and parts == e.parts else piece(coord, e.bounds, parts)


def _rebuild_reduce(e: Reduce, f: Rewrite, g: Move) -> Expr:
    body = f(e.body)
    return e if body is e.body else reduce(e.op, body, e.bound, e.extents)


_REBUILD: dict[type[Expr], Callable[[Any, Rewrite, Move], Expr]] = {
    Const: lambda e, f, g: e, Acc: lambda e, f, g: e, Index: _rebuild_index, Load: _rebuild_load,
    Unary: _rebuild_unary, Binary: _rebuild_binary, Select: _rebuild_select, Piece: _rebuild_piece,
    Reduce: _rebuild_reduce,
}  # fmt: skip


_fresh = 1 << 20


def substitute_axes(e: Expr, mapping: Mapping[int, Coord], memo: dict[Expr, Expr] | None = None) -> Expr:
    """`e` with every free axis replaced by a coordinate over other axes. Capture-free.

    The replacement may be dynamic where the axis occurs as a plain digit (`div` 1, no `mod`) of a load or an index.
    Raises `NotAffine` when a digit `(axis // div) % mod` of the replacement is not quasi-affine.
    """
    global _fresh
    memo = {} if memo is None else memo

    def go(x: Expr) -> Expr:
        if not (x.axes & keys):
            return x
        hit = memo.get(x)
        if hit is None:
            if isinstance(x, Reduce) and clash & frozenset(x.bound):
                hit = _freshen(x, go)
            else:
                hit = rebuild(x, go, coord)
            memo[x] = hit
        return hit

    def coord(c: Coord) -> Coord:
        return coord_substitute(c, mapping, go)

    keys = frozenset(mapping)
    clash = keys.union(*(c.axes() for c in mapping.values()))
    return go(e)


def _freshen(x: Reduce, go: Callable[[Expr], Expr]) -> Expr:
    """Transforms a reduction whose bound axes also occur in the replacement, by renaming them first."""
    global _fresh
    ids = tuple(range(_fresh, _fresh + len(x.bound)))
    _fresh += len(ids)
    body = substitute_axes(x.body, {a: coord_axis(i, n) for a, i, n in zip(x.bound, ids, x.extents, strict=True)})
    return reduce(x.op, go(body), ids, x.extents)


class NotAffine(Exception):
    """An index map does not stay quasi-affine: the value has to be materialised."""


def coord_substitute(c: Coord, mapping: Mapping[int, Coord], on_dyn: Callable[[Expr], Expr]) -> Coord:
    """`c` with its axes replaced; its dynamic part is transformed by `on_dyn`."""
    const_, terms = c.const, []
    dynamic: Expr | None = None
    for t in c.terms:
        repl = mapping.get(t.axis)
        if repl is None:
            terms.append(t)
            continue
        if repl.dyn is not None:
            if t.div != 1 or t.mod:
                raise NotAffine(f"digit of the dynamic coordinate {repl}")
            step = coord_value(repl)
            step = step if t.coef == 1 else binary("mul", step, const(t.coef, "i32"))
            dynamic = step if dynamic is None else binary("add", dynamic, step)
            continue
        if t.div != 1 or (t.mod and repl.max >= t.mod):
            repl = _digit(repl, t.div, t.mod)
        const_ += t.coef * repl.const
        if t.coef == 1:
            terms += repl.terms
        else:
            terms += [Term(r.coef * t.coef, r.axis, r.div, r.mod, r.extent) for r in repl.terms]
    if dynamic is not None:  # each step is in range already, so the clamp to the original maximum changes nothing
        dynamic = dynamic if c.dyn is None else binary("add", dynamic, on_dyn(c.dyn))
        return collect(const_, terms, dynamic, c.max if c.dyn is None else c.limit)
    return collect(const_, terms, on_dyn(c.dyn) if c.dyn is not None else None, c.limit)


def _digit(c: Coord, div: int, mod: int) -> Coord:
    """`(c // div) % mod`; raises `NotAffine`."""
    for n, part in ((div, 0), (mod, 1)):
        if n > 1 and not (part and c.max < n):
            split = coord_split(c, n)
            if split is None:
                raise NotAffine(f"digit of {c} by {n}")
            c = split[part]
    return c


def substitute_loads(e: Expr, f: Callable[[Load], Expr | None]) -> Expr:
    """`e` with every `Load` for which `f` gives an expression replaced by it (its dynamic coordinates go first).

    The replacement may use the axes that are in scope at the load, including axes bound by enclosing reductions.
    """
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if not x.loads:
            return x
        hit = memo.get(x)
        if hit is None:
            if isinstance(x, Reduce):
                # The replacement may contain reductions of its own: give the bound axes ids that cannot collide.
                hit = _freshen(x, go)
            else:
                hit = rebuild(x, go, lambda c: Coord(c.const, c.terms, go(c.dyn), c.limit) if c.dyn is not None else c)
            if isinstance(hit, Load):
                repl = f(hit)
                hit = hit if repl is None else repl
            memo[x] = hit
        return hit

    return go(e)


def walk(e: Expr) -> tuple[Expr, ...]:
    """Every distinct node below and including `e`, operands first."""
    if e._below is None:
        below: list[Expr] = []
        seen: set[Expr] = {e}
        stack: list[tuple[Expr, bool]] = [(a, False) for a in e.args()]
        while stack:
            node, done = stack.pop()
            if done:
                below.append(node)
            elif node not in seen:
                seen.add(node)
                args = node.args()
                if args:
                    stack.append((node, True))
                    stack += [(a, False) for a in args]
                else:
                    below.append(node)
        e._below = tuple(below)
    return (*e._below, e)


def walk_loads(e: Expr) -> tuple[tuple[Load, Ranges], ...]:
    """Every distinct load, with the ranges to which the pieces around it restrict plain axes."""
    if not e.loads:
        return ()
    if e._reads is None:
        seen: set[tuple[Expr, Ranges]] = {(e, ())}
        found: list[tuple[Load, Ranges]] = []
        stack = _parts(e, ())
        while stack:
            key = stack.pop()
            node, ranges = key
            if not node.loads or key in seen:
                continue
            seen.add(key)
            if isinstance(node, Load):
                found.append((node, ranges))
            stack += _parts(node, ranges)
        e._reads = tuple(found)
    return ((e, ()), *e._reads) if isinstance(e, Load) else e._reads


def _parts(e: Expr, ranges: Ranges) -> list[tuple[Expr, Ranges]]:
    """The operands of a node, with the ranges that hold there."""
    if isinstance(e, Piece):
        bounds = pairwise(e.bounds)
        return [(p, restrict(ranges, e.coord, lo, hi)) for p, (lo, hi) in zip(e.parts, bounds, strict=True)]
    return [(a, ranges) for a in e.args()]
