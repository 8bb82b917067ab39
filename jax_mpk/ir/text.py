"""Expressions and coordinates as text: what printed IRs, errors and dumps show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from jax_mpk.ir.coord import CORE_AXIS, REDUCE_AXIS, Coord, digit_extent
from jax_mpk.ir.expr import Acc, Binary, Const, Expr, Index, Load, Piece, Reduce, Select, Unary, const, walk

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "ne": "!=", "and": "&",
          "or": "|", "xor": "^", "shl": "<<", "sar": ">>"}  # fmt: skip


def axis_name(axis: int) -> str:
    """`i0, i1, ...` for domain axes, `k0, ...` for a core's axes, `r0, r1, ...` for bound ones."""
    if axis < CORE_AXIS:
        return f"i{axis}"
    return f"k{axis - CORE_AXIS}" if axis < REDUCE_AXIS else f"r{axis - REDUCE_AXIS}"


def axes_text(axes: Iterable[tuple[int, int]]) -> str:
    """Axes with their extents."""
    return ", ".join(f"{axis_name(a)}<{n}" for a, n in axes)


_Name = Callable[[int], str]
_Scope = Mapping[int, int] | None
"""The extents of the axes in scope. A digit says its own where it has another (None: it never does)."""


def coord_text(c: Coord, name: _Name, scope: _Scope = None) -> str:
    return _coord(c, lambda e: to_text(e, name, scope), scope)


def _coord(c: Coord, of: Callable[[Expr], str], scope: _Scope) -> str:
    parts = []
    for t in c.terms:
        s = axis_name(t.axis) + (f"//{t.div}" if t.div != 1 else "") + (f"%{t.mod}" if t.mod else "")
        if scope is not None and (t.axis not in scope or t.extent != digit_extent(scope[t.axis], t.div, t.mod)):
            s += f"<{t.extent}"
        s = s if abs(t.coef) == 1 else f"{abs(t.coef)}*({s})" if set("/%<") & set(s) else f"{abs(t.coef)}*{s}"
        parts.append(("-" if t.coef < 0 else "+") + s)
    if c.const or not (parts or c.dyn is not None):
        parts.append(f"{c.const:+}")
    if c.dyn is not None:
        parts.append(f"+clamp<{c.limit}>({of(c.dyn)})")
    return "".join(parts).removeprefix("+")


LONG_TEXT = 2000
"""An expression of more nodes than this, shared ones counted each time, is written with names for what is shared."""


def to_text(e: Expr, name: _Name = lambda v: f"%{v}", scope: _Scope = None) -> str:
    """One line of text; `name` turns value ids into names. With the extents of the axes in scope (those bound inside
    add themselves) and the types of values nothing is lost: see `jax_mpk.ir.parse`."""
    order = list(walk(e))
    size: dict[Expr, int] = {}
    uses: dict[Expr, int] = {}
    for x in order:
        size[x] = 1 + sum(size[a] for a in x.args())
        for a in x.args():
            uses[a] = uses.get(a, 0) + 1
    names: dict[Expr, str] = {}
    if size[e] <= LONG_TEXT:
        return _text(e, name, names, scope)
    lets = []
    for x in order:
        if uses.get(x, 0) > 1 and size[x] > 3:
            text = _text(x, name, names, scope)
            names[x] = f"${len(names)}"
            lets.append(f"{names[x]} = {text}")
    whole = _text(e, name, names, scope)
    return "; ".join(["let " + lets[0], *lets[1:], whole]) if lets else whole


def _const(e: Const) -> str:
    """Its type shows: 1.0 (the shortest digits that are this float32 and no other, "1e-05", "-0.0", "inf"), 1, 1u, true."""
    if e.dtype == "f32":
        near = (float(f"{e.value:.{n}g}") for n in range(1, 10))
        return repr(next((x for x in near if const(x, "f32") is e), e.value))
    return str(e.value).lower() + ("u" if e.dtype == "u32" else "")


def _text(e: Expr, name: _Name, names: Mapping[Expr, str], scope: _Scope) -> str:
    if e in names:
        return names[e]

    def of(x: Expr) -> str:
        return _text(x, name, names, scope)

    def at(c: Coord) -> str:
        return _coord(c, of, scope)

    if isinstance(e, Const):
        return _const(e)
    if isinstance(e, Index):
        return f"index({at(e.coord)})"
    if isinstance(e, Load):
        return f"{name(e.value)}[{', '.join(at(c) for c in e.coords)}]"
    if isinstance(e, Unary):
        return f"{e.op}({of(e.a)})"
    if isinstance(e, Binary):
        return f"({of(e.a)} {INFIX[e.op]} {of(e.b)})" if e.op in INFIX else f"{e.op}({of(e.a)}, {of(e.b)})"
    if isinstance(e, Select):
        return f"({of(e.cond)} ? {of(e.a)} : {of(e.b)})"
    if isinstance(e, Piece):
        low = f"{e.bounds[0]}<=" if e.bounds[0] else ""
        parts = "; ".join(f"<{hi}: {of(p)}" for hi, p in zip(e.bounds[1:], e.parts, strict=True))
        return f"piece({low}{at(e.coord)}; {parts})"
    if isinstance(e, Reduce):
        inside = None if scope is None else {**scope, **dict(zip(e.bound, e.extents, strict=True))}
        return f"{e.op}[{axes_text(zip(e.bound, e.extents, strict=True))}]({_text(e.body, name, names, inside)})"
    if isinstance(e, Acc):
        return f"acc{e.index}"
    raise TypeError(type(e).__name__)
