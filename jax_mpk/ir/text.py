"""Expressions and coordinates as text: what printed IRs, errors and dumps show."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jax_mpk.ir.coord import CORE_AXIS, REDUCE_AXIS, Coord
from jax_mpk.ir.expr import Acc, Binary, Const, Expr, Index, Load, Piece, Reduce, Select, Unary, walk

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "ne": "!=", "and": "&",
          "or": "|", "xor": "^", "shl": "<<", "sar": ">>"}  # fmt: skip


def axis_name(axis: int) -> str:
    """`i0, i1, ...` for domain axes, `k0, ...` for a core's axes, `r0, r1, ...` for bound ones."""
    if axis < CORE_AXIS:
        return f"i{axis}"
    return f"k{axis - CORE_AXIS}" if axis < REDUCE_AXIS else f"r{axis - REDUCE_AXIS}"


def coord_text(c: Coord, name: Callable[[int], str], dyn_text: Callable[[Expr], str] | None = None) -> str:
    parts = []
    for t in c.terms:
        s = axis_name(t.axis)
        s = f"{s}//{t.div}" if t.div != 1 else s
        s = f"{s}%{t.mod}" if t.mod else s
        parts.append(s if t.coef == 1 else f"{t.coef}*({s})" if "/" in s or "%" in s else f"{t.coef}*{s}")
    if c.const or not (parts or c.dyn is not None):
        parts.append(str(c.const))
    if c.dyn is not None:
        text = dyn_text(c.dyn) if dyn_text is not None else to_text(c.dyn, name)
        parts.append(f"clamp<{c.limit}>({text})")
    return "+".join(parts)


LONG_TEXT = 2000
"""An expression of more nodes than this, shared ones counted each time, is written with names for what is shared."""


def to_text(e: Expr, name: Callable[[int], str] = lambda v: f"%{v}") -> str:
    """One line of text; `name` turns value ids into names."""
    order = list(walk(e))
    size: dict[Expr, int] = {}
    uses: dict[Expr, int] = {}
    for x in order:
        size[x] = 1 + sum(size[a] for a in x.args())
        for a in x.args():
            uses[a] = uses.get(a, 0) + 1
    names: dict[Expr, str] = {}
    if size[e] <= LONG_TEXT:
        return _text(e, name, names)
    lets = []
    for x in order:
        if uses.get(x, 0) > 1 and size[x] > 3:
            text = _text(x, name, names)
            names[x] = f"${len(names)}"
            lets.append(f"{names[x]} = {text}")
    return "; ".join(["let " + lets[0], *lets[1:], _text(e, name, names)]) if lets else _text(e, name, names)


def _text(e: Expr, name: Callable[[int], str], names: Mapping[Expr, str]) -> str:
    if e in names:
        return names[e]

    def of(x: Expr) -> str:
        return _text(x, name, names)

    def at(c: Coord) -> str:
        return coord_text(c, name, of)

    if isinstance(e, Const):
        return f"{e.value:g}" if e.dtype == "f32" else str(e.value).lower()
    if isinstance(e, Index):
        return f"index({at(e.coord)})"
    if isinstance(e, Load):
        return f"{name(e.value)}[{', '.join(at(c) for c in e.coords)}]"
    if isinstance(e, Unary):
        return f"{e.op}({of(e.a)})"
    if isinstance(e, Binary):
        return f"({of(e.a)} {_INFIX[e.op]} {of(e.b)})" if e.op in _INFIX else f"{e.op}({of(e.a)}, {of(e.b)})"
    if isinstance(e, Select):
        return f"({of(e.cond)} ? {of(e.a)} : {of(e.b)})"
    if isinstance(e, Piece):
        parts = "; ".join(f"<{hi}: {of(p)}" for hi, p in zip(e.bounds[1:], e.parts, strict=True))
        return f"piece({at(e.coord)}; {parts})"
    if isinstance(e, Reduce):
        axes = ", ".join(f"{axis_name(a)}<{n}" for a, n in zip(e.bound, e.extents, strict=True))
        return f"{e.op}[{axes}]({of(e.body)})"
    if isinstance(e, Acc):
        return f"acc{e.index}"
    raise TypeError(type(e).__name__)
