"""Pass `recognise`: structure that has a core of its own, however it was spelled.

Attention: a contraction whose left operand, with every map in between written out, is a softmax over the contracted
axis of an expression of another contraction's result. Matching is on interned expressions: the maximum and the sum of
a softmax are *rebuilt* from the scores and compared by identity, so there are no spellings to list. Cache updates
written as a select by position become in-place updates. Everything recognised here also runs unrecognised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from jax_mpk.ir import algebra
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Binary, Const, Coord, Expr, Index, Load, Reduce, Select, Unary
from jax_mpk.ir.graph import HEAD_AXIS, KEY_AXIS, Append, Attention, Contract, Graph, Map, Op, Update
from jax_mpk.passes.axes import digit_divisors, plain_axis, split
from jax_mpk.passes.inplace import run as make_inplace_legal
from jax_mpk.passes.simplify import dead, replace_acc
from jax_mpk.passes.substitute import at, expand

MASKED = -1e30
"""A score at or below this is masked: its softmax weight is exactly zero beside a real score, which is far greater."""


def run(g: Graph) -> Graph:
    """Updates first (attention reads caches through them), then attention."""
    maps = {op.out: op for op in g.ops if isinstance(op, Map)}
    contracts = {op.out: op for op in g.ops if isinstance(op, Contract)}
    ops: list[Op] = []
    changed = False
    for op in g.ops:
        new: Op | None = None
        if isinstance(op, Map):
            new = _select_update(g, op, maps)
        elif isinstance(op, Contract):
            new = _attention(g, op, maps, contracts)
        changed |= new is not None
        ops.append(new or op)
    return make_inplace_legal(dead(g.with_ops(ops))) if changed else g


# --------------------------------------------------------------------------------------------------------- cache updates


def _select_update(g: Graph, op: Map, maps: dict[int, Map]) -> Update | None:
    """`where(iota == position, new, old)`: a write at one position of one axis."""
    e, v = op.expr, g.values[op.out]
    if not isinstance(e, Select) or op.store is not None:
        return None
    head = _ahead(e.cond, maps)  # writing everything out is not cheap
    match = _equal_index(expand(e.cond, maps)) if isinstance(head, Binary) and head.op == "eq" else None
    if match is None:
        return None
    axis, position = match
    old, new = e.b, e.a
    identity = tuple(E.coord_axis(a, n) for a, n in enumerate(v.shape))
    if not isinstance(old, Load) or old.coords != identity or axis in new.axes or axis in position.axes:
        return None
    target = g.values[old.value]
    if (target.shape, target.dtype) != (v.shape, v.dtype) or old.value in new.loads | position.loads:
        return None
    window = tuple(1 if a == axis else n for a, n in enumerate(v.shape))
    coords = tuple(Coord(0, (), position, n - 1) if a == axis else identity[a] for a, n in enumerate(v.shape))
    append = Append(old.value, op.out, window, tuple(range(len(window))), new, coords, oob="drop")
    return Update(op.out, window, op.source, None, append)


def _equal_index(cond: Expr) -> tuple[int, Expr] | None:
    if isinstance(cond, Binary) and cond.op == "eq" and cond.a.dtype == "i32":
        for x, y in ((cond.a, cond.b), (cond.b, cond.a)):
            axis = plain_axis(x.coord) if isinstance(x, Index) else None
            if axis is not None:
                return axis, y
    return None


# ------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Softmax:
    """P = prob(softmax over `axis` of `scores`); `prob` is an expression of Acc(0)."""

    scores: Expr
    prob: Expr


def _attention(g: Graph, op: Contract, maps: dict[int, Map], contracts: dict[int, Contract]) -> Attention | None:
    """The attention that ends in the contraction `op`, or None."""
    if len(op.k) != 1 or len(op.rhs) != 1:
        return None
    axis, keys = op.k[0]
    for weights, values in ((op.lhs, op.rhs[0]), (op.rhs[0], op.lhs)):
        if not isinstance(values, Load) or not _looks_normalised(weights, maps):
            continue
        soft = _softmax(expand(weights, maps), axis, keys)
        if soft is None:
            continue
        built = _build(g, op, soft, values, contracts)
        if built is not None:
            return built
    return None


def _looks_normalised(e: Expr, maps: dict[int, Map]) -> bool:
    """Cheap: does a quotient or product of an exponential come next? (Writing everything out is not cheap.)"""
    e = _ahead(e, maps)
    if not (isinstance(e, Binary) and e.op in ("div", "mul")):
        return False
    return any(isinstance(x, Unary) and x.op == "exp" for x in (_ahead(e.a, maps), _ahead(e.b, maps)))


def _ahead(x: Expr, maps: dict[int, Map]) -> Expr:
    """The first operation behind loads of maps and roundings."""
    x = _strip(x)
    while isinstance(x, Load) and x.value in maps:
        x = _strip(maps[x.value].expr)
    return x


def _softmax(p: Expr, axis: int, extent: int) -> _Softmax | None:
    """Matches `round(exp(T - max T) / sum exp(T - max T))`; roundings between the steps are dropped (more exact)."""
    prob: Expr = E.acc(0)
    wrap: list[str] = []
    while isinstance(p, Unary) and p.op.startswith("round_"):
        wrap.append(p.op)
        p = p.a
    for name in reversed(wrap):
        prob = E.unary(name, prob)
    p = _unrounded(p)
    if not (isinstance(p, Binary) and p.op in ("div", "mul")):
        return None
    sides = ((p.a, p.b),) if p.op == "div" else ((p.a, p.b), (p.b, p.a))
    for e, other in sides:
        norm = _reciprocal(other) if p.op == "mul" else other
        if norm is None or not (isinstance(e, Unary) and e.op == "exp"):
            continue
        diff = e.a
        if not (isinstance(diff, Binary) and diff.op == "sub" and isinstance(diff.b, Reduce)):
            continue
        scores = diff.a
        top = E.reduce("max", scores, (axis,), (extent,))
        total = E.reduce("sum", E.unary("exp", E.binary("sub", scores, top)), (axis,), (extent,))
        if diff.b is top and norm is total:
            return _Softmax(scores, prob)
    return None


def _reciprocal(e: Expr) -> Expr | None:
    if isinstance(e, Binary) and e.op == "div" and isinstance(e.a, Const) and e.a.value == 1.0:
        return e.b
    return None


def _unrounded(e: Expr) -> Expr:
    """`e` without the roundings inside the softmax itself (those of the scores stay)."""

    def exp_part(x: Expr) -> Expr:
        x = _strip(x)
        if isinstance(x, Unary) and x.op == "exp":
            d = _strip(x.a)
            return E.unary("exp", E.binary("sub", d.a, _strip(d.b))) if isinstance(d, Binary) and d.op == "sub" else x
        return x

    def total(x: Expr) -> Expr:
        x = _strip(x)
        if isinstance(x, Reduce) and x.op == "sum":
            return E.reduce("sum", exp_part(x.body), x.bound, x.extents)
        if isinstance(x, Binary) and x.op == "div":
            return E.binary("div", x.a, total(x.b))
        return exp_part(x)

    if isinstance(e, Binary) and e.op in ("div", "mul"):
        return E.binary(e.op, total(e.a) if e.op == "mul" else exp_part(e.a), total(e.b))
    return e


def _strip(e: Expr) -> Expr:
    while isinstance(e, Unary) and e.op.startswith("round_"):
        e = e.a
    return e


def _build(g: Graph, op: Contract, soft: _Softmax, values: Load, contracts: dict[int, Contract]) -> Attention | None:
    """Puts the pieces on common axes; None when the structure is not that of attention after all."""
    axis, keys = op.k[0]
    logits = {x for x in E.walk(soft.scores) if isinstance(x, Load) and x.value in contracts and axis in x.axes}
    if len(logits) != 1:
        return None
    load = next(iter(logits))
    dot = contracts[load.value]
    if (
        dot.lhs.dtype != "f32"
        or len(dot.k) != 1
        or len(dot.rhs) != 1
        or dot.store is not None
        or any(c.dyn is not None for c in load.coords)
    ):
        return None
    head_axis, head = dot.k[0]
    key = {axis: E.coord_axis(KEY_AXIS, keys)}
    try:
        coords = [E.coord_substitute(c, key, lambda e: e) for c in load.coords]
        point = {**dict(enumerate(coords)), head_axis: E.coord_axis(HEAD_AXIS, head)}
        sides = [E.substitute_axes(x, point) for x in (dot.lhs, dot.rhs[0])]
        raw = replace_acc(dot.epilogue, [E.acc(0)])
        score = E.substitute_loads(soft.scores, lambda x: at(raw, x.coords) if x is load else None)
        score, values_ = (E.substitute_axes(e, key) for e in (score, values))
    except E.NotAffine:
        return None
    q, k = sides if KEY_AXIS in sides[1].axes else sides[::-1]
    if not isinstance(k, Load) or not isinstance(values_, Load) or KEY_AXIS in q.axes or KEY_AXIS not in k.axes:
        return None
    exprs = {"q": q, "k": k, "v": values_, "score": score, "prob": soft.prob, "epilogue": op.epilogue}
    return _on_axes(g, op, exprs, keys, head)


def _on_axes(g: Graph, op: Contract, exprs: dict[str, Expr], keys: int, head: int) -> Attention | None:
    """Splits domain axes where k or v use digits of them (grouped queries), then assigns the roles of the axes."""
    coords = [c for r in ("k", "v") for c in exprs[r].coords]  # type: ignore[attr-defined]
    extents: list[int] = []
    mapping: dict[int, Coord] = {}
    for a, n in enumerate(op.domain):
        digits = split(n, digit_divisors(coords, a, n))
        if digits is None:
            return None
        flat, scale = E.coord_const(0), 1
        for j in reversed(range(len(digits))):
            flat = E.coord_add(flat, E.coord_scale(E.coord_axis(len(extents) + j, digits[j]), scale))
            scale *= digits[j]
        mapping[a] = flat
        extents += digits
    try:
        exprs = {r: E.substitute_axes(e, mapping) for r, e in exprs.items()}
    except E.NotAffine:
        return None
    exprs = {r: algebra.simplify(e) for r, e in exprs.items()}
    identity = tuple(E.coord_axis(a, n) for a, n in enumerate(g.values[op.out].shape))
    store = tuple(E.coord_substitute(c, mapping, lambda e: e) for c in op.store or identity)
    domain = tuple(extents)
    core = {HEAD_AXIS, KEY_AXIS}
    k_axes, v_axes, q_axes = (frozenset(exprs[r].axes) - core for r in ("k", "v", "q"))
    scored = q_axes | k_axes | (exprs["score"].axes - core)
    columns = [a for a in v_axes if a not in scored and domain[a] > 1]
    if len(columns) != 1:
        return None
    batch = tuple(a for a in range(len(domain)) if a in (k_axes | v_axes) and a != columns[0])
    rows = tuple(a for a in range(len(domain)) if a not in batch and a != columns[0])
    score_axes = frozenset(batch) | frozenset(rows) | {KEY_AXIS}
    column_free = [exprs["score"].axes, q_axes, k_axes]
    if any(columns[0] in axes for axes in column_free):
        return None
    exprs["score"] = replace_acc(exprs["score"], [E.acc(0, score_axes)])
    exprs["prob"] = replace_acc(exprs["prob"], [E.acc(0, score_axes)])
    exprs["epilogue"] = replace_acc(exprs["epilogue"], [E.acc(0, range(len(domain)))])
    out = Attention(op.out, domain, replace(op.source, primitive="attention"), store if store != identity else None,
                    batch, rows, columns[0], keys, head)  # fmt: skip
    return replace(out.with_exprs(exprs), limit=_limit(exprs["score"], rows, domain, keys))


# ------------------------------------------------------------------------------------------------------- causal limits


def _limit(score: Expr, rows: tuple[int, ...], domain: tuple[int, ...], keys: int) -> Expr | None:
    """An exclusive bound on the keys that any row attends to, if the mask shows one: `key <= f(batch, row)`.

    Only a mask that is this one comparison counts, or this and a lower bound, as of a sliding window (which stays a mask).
    Keys beyond the bound have a weight of exactly zero and are not read: what is stored there, NaN included, does not count
    (docs/decisions.md, 56 and 70). Where some row has no key at all, its softmax is over nothing but masked scores, and where
    `f` wraps around it has no largest value: then the bound is all keys, as written.
    """
    cond = _mask(score)
    bounds = [] if cond is None else [_bound(x, keep) for x, keep in _conjuncts(*cond)]
    upper = [b for b in bounds if b is not None and b.upper]
    lower = [b for b in bounds if b is not None and not b.upper]
    if len(upper) != 1 or len(lower) > 1 or len(upper) + len(lower) != len(bounds):
        return None
    bound, inclusive = upper[0].at, upper[0].inclusive
    top, bottom = (_extreme_over(bound, rows, domain, largest) for largest in (True, False))
    if top is None or bottom is None or KEY_AXIS in top.axes:
        return None
    zero, last, all_keys = (E.const(n, "i32") for n in (0, keys - 1, keys))
    irregular = E.binary("lt" if inclusive else "le", bottom, zero)
    if top is not bottom:
        irregular = E.binary("or", irregular, E.binary("lt", top, bottom))
    for b in lower:  # the last key of the row with the fewest is one that every row may see
        first, low = (_extreme_over(b.at, rows, domain, largest) for largest in (True, False))
        if first is None or low is None or KEY_AXIS in first.axes:
            return None
        end = E.binary("min", bottom, last if inclusive else all_keys)
        end = end if inclusive else E.binary("sub", end, E.const(1, "i32"))
        empty = E.binary("lt" if b.inclusive else "le", end, first)
        irregular = E.binary("or", irregular, empty)
        if first is not low:
            irregular = E.binary("or", irregular, E.binary("lt", first, low))
    if inclusive:
        end = E.binary("add", E.binary("min", top, last), E.const(1, "i32"))
    else:
        end = E.binary("min", top, all_keys)
    return algebra.simplify(E.select(irregular, all_keys, end))


def _mask(score: Expr) -> tuple[Expr, bool] | None:
    """(c, keep): scores stay where c is `keep`, and are masked elsewhere; None for anything but one mask, or one inside
    the other, that reaches the softmax."""
    masks = [x for x in E.walk(score) if isinstance(x, Select) and x.dtype == "f32"]
    found: tuple[Expr, bool] | None = None
    inside = score
    for m in reversed(masks):  # outermost first
        if not (_mask_survives(inside, m) if m is masks[-1] else _strip(inside) is m):
            return None
        if not _is_masked(m.b) and not _is_masked(m.a):
            return None
        keep = _is_masked(m.b)
        if found is None:
            found = m.cond, keep
        else:
            both = (c if k else E.unary("not", c) for c, k in (found, (m.cond, keep)))
            found = E.binary("and", *both), True
        inside = m.a if keep else m.b
    return found


def _conjuncts(cond: Expr, keep: bool) -> list[tuple[Expr, bool]]:
    """Conditions that are all to be what is beside them where `cond` is `keep`."""
    if isinstance(cond, Unary) and cond.op == "not":
        return _conjuncts(cond.a, not keep)
    if isinstance(cond, Binary) and cond.dtype == "bool" and cond.op == ("and" if keep else "or"):
        return [*_conjuncts(cond.a, keep), *_conjuncts(cond.b, keep)]
    return [(cond, keep)]


class _Bound(NamedTuple):
    """`key <= at` (upper, inclusive), `key < at`, `key >= at` or `key > at`."""

    at: Expr
    upper: bool
    inclusive: bool


def _is_masked(e: Expr) -> bool:
    return isinstance(e, Const) and e.dtype == "f32" and e.value <= MASKED


def _mask_survives(score: Expr, mask: Select) -> bool:
    """The masked value reaches the softmax: the score is the select, or a sum with one side the select (a bias)."""
    score = _strip(score)
    if score is mask:
        return True
    return isinstance(score, Binary) and score.op == "add" and any(_strip(x) is mask for x in (score.a, score.b))


def _bound(cond: Expr, keep: bool) -> _Bound | None:
    """The bound on the key that the condition is `keep` for; None if it is another condition."""
    if not isinstance(cond, Binary) or cond.op not in ("lt", "le") or cond.a.dtype != "i32":
        return None
    inclusive = (cond.op == "le") == keep  # not (a < key) is key <= a
    if _is_key(cond.a):  # key < b, key <= b
        return _Bound(cond.b, keep, inclusive)
    if _is_key(cond.b):  # a < key, a <= key
        return _Bound(cond.a, not keep, inclusive)
    return None


def _is_key(e: Expr) -> bool:
    return isinstance(e, Index) and plain_axis(e.coord) == KEY_AXIS


def _extreme_over(e: Expr, rows: Iterable[int], domain: tuple[int, ...], largest: bool) -> Expr | None:
    """The largest or smallest value over the row axes of a sum of an index that grows with them and terms free of them.

    In 32 bits, like the sum itself: if the sum wraps around for some rows only, the largest is less than the smallest.
    """
    rows = frozenset(rows)
    if not e.axes & rows:
        return e
    if isinstance(e, Index) and all(t.coef > 0 and t.div == 1 and not t.mod for t in e.coord.terms if t.axis in rows):
        last = sum(t.coef * (domain[t.axis] - 1) for t in e.coord.terms if t.axis in rows) if largest else 0
        return E.index(Coord(e.coord.const + last, tuple(t for t in e.coord.terms if t.axis not in rows)))
    if isinstance(e, Binary) and e.op in ("add", "sub") and _apart(e, rows):
        a, b = (_extreme_over(x, rows, domain, largest) for x in (e.a, e.b))
        return None if a is None or b is None else E.binary(e.op, a, b)
    return None


def _apart(e: Binary, rows: frozenset[int]) -> bool:
    """Whether one side alone goes with the rows, of a difference the left one."""
    return not e.b.axes & rows or (e.op == "add" and not e.a.axes & rows)
