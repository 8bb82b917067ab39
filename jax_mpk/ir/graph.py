"""The op graph: tensors as values, operators with expressions on their edges.

Every operator writes one value. There are few kinds, and all of them say what they read by expressions
(`jax_mpk.ir.expr`), so one fusion mechanism serves them all:

    Map        out[i...]  = expr                      element-wise work, row reductions, gathers, index maps
    Update     out        = target, window overwritten  in place: `out` lives in the buffer of `target`
    Contract   acc_j[i..] = sum_k lhs * rhs_j ;  out = epilogue(acc_0, acc_1, ...)
    Attention  out        = epilogue(sum_s prob(softmax_s(score(sum_d q*k))) * v), with cache appends in place
    Sort       out        = rows sorted (values or indices), stable
    Scan       acc_i      = element_0 op ... op element_i along a row ;  out = epilogue(acc)

A graph is in topological order, which is also the order whose sequential execution defines the result: passes may
reorder, split and fuse, and the verifier proves that the parallel program is equivalent to this order.
Frozen dataclasses; a pass builds a new `Graph`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, NoReturn, Self

import numpy as np

from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.text import axes_text, axis_name, coord_text, to_text

DTYPES: dict[str, tuple[int, str]] = {
    "f32": (4, "f32"), "bf16": (2, "f32"), "f16": (2, "f32"),
    "i32": (4, "i32"), "i16": (2, "i32"), "i8": (1, "i32"),
    "u32": (4, "u32"), "u16": (2, "u32"), "u8": (1, "u32"), "bool": (1, "bool"),
}  # fmt: skip
"""Element types in memory: bytes, and the type in which expressions compute with them."""


def itemsize(dtype: str) -> int:
    return DTYPES[dtype][0]


def compute_dtype(dtype: str) -> str:
    return DTYPES[dtype][1]


@dataclass(frozen=True)
class Source:
    """Where an operator comes from: the jaxpr primitive and the user's `file:line (function)`."""

    primitive: str = ""
    where: str = ""

    def __str__(self) -> str:
        return f"{self.primitive} at {self.where}" if self.where else self.primitive


@dataclass(frozen=True)
class Value:
    """A tensor. `role`: "arg" (operand `index` of the call), "const" (`data`), or "temp" (made by an operator)."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    role: str = "temp"
    index: int = -1
    data: np.ndarray | None = field(default=None, compare=False, repr=False)
    name: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.name or '%' + str(self.id)}:{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Op:
    """Common part: the value written, the iteration domain (its axes are `0 .. len(domain)-1`), the origin.

    The domain of an operator enumerates the elements that it writes; `store` maps a point to coordinates of `out`
    (None: the domain is `out`'s shape and the map is the identity).
    """

    out: int
    domain: tuple[int, ...]
    source: Source = Source()
    store: tuple[Coord, ...] | None = None

    kind = "op"
    details: ClassVar[tuple[str, ...]] = ()
    """Further fields that say what it computes, besides domain, store and expressions."""

    @property
    def row(self) -> int | None:
        """The domain axis of which its core takes one whole row at a time, if it does."""
        return None

    @property
    def sums(self) -> tuple[str, ...]:
        """The types of the accumulators that its core leaves to an epilogue, of the domain, that can be grown."""
        return ()

    def renamed(self, new: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Self:
        """With the domain axes that its own fields name (not its expressions) as `new` has them."""
        return self

    def exprs(self) -> dict[str, Expr]:
        """Every expression by role name; the generic passes work on this and on `with_exprs`."""
        raise NotImplementedError

    def with_exprs(self, exprs: dict[str, Expr]) -> Self:
        """The operator with these expressions instead of its own, by role."""
        now = self.exprs()
        return self if all(now.get(r) is e for r, e in exprs.items()) else self._with(exprs)

    def scope(self, role: str) -> dict[int, int]:
        """The axes that the expression of a role may use, with their extents."""
        return dict(enumerate(self.domain))

    def accumulators(self, role: str) -> tuple[Expr, ...]:
        """The results of the core that the expression of a role may use."""
        return ()

    def _with(self, exprs: dict[str, Expr]) -> Self:
        raise NotImplementedError

    def reads(self) -> frozenset[int]:
        return self._reads

    @functools.cached_property
    def _reads(self) -> frozenset[int]:
        return frozenset().union(*(e.loads for e in self.exprs().values()))

    def writes(self) -> tuple[int, ...]:
        return (self.out,)

    def inplace(self) -> tuple[tuple[int, int], ...]:
        """Pairs (value consumed, value produced) that share one buffer."""
        return ()


@dataclass(frozen=True)
class Map(Op):
    expr: Expr = None  # type: ignore[assignment]
    kind = "map"

    def exprs(self) -> dict[str, Expr]:
        return {"expr": self.expr}

    def _with(self, exprs: dict[str, Expr]) -> Self:
        return replace(self, expr=exprs.get("expr", self.expr))


@dataclass(frozen=True)
class Append:
    """A window written in place: `out` is `target` with `expr` (over the axes `axes`) stored at `coords`.

    Window dimension j has extent `window[j]` and axis id `axes[j]`. In an `Update` these are the domain axes 0, 1, ...
    In an `Attention` a dimension that runs along with a batch axis *is* that domain axis; the others (new positions,
    head dimension) have core axis ids from `APPEND_AXIS` on.
    `oob` says what happens to an out-of-range dynamic coordinate: "clamp" (dynamic_update_slice; the clamping is in
    the coordinate) or "drop" (scatter). `mode` is "set", or the operation of `abi.COMBINES` that combines old and new (points in index order, each on its own).
    """

    target: int
    out: int
    window: tuple[int, ...]
    axes: tuple[int, ...]
    expr: Expr
    coords: tuple[Coord, ...]
    mode: str = "set"
    oob: str = "clamp"


@dataclass(frozen=True)
class Update(Op):
    """In-place window update; `domain` is the window. See `Append` for the fields."""

    append: Append = None  # type: ignore[assignment]
    kind = "update"

    def exprs(self) -> dict[str, Expr]:
        return _append_exprs("", self.append)

    def _with(self, exprs: dict[str, Expr]) -> Self:
        return replace(self, append=_append_with("", self.append, exprs))

    @functools.cached_property
    def _reads(self) -> frozenset[int]:
        return super()._reads | {self.append.target}

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((self.append.target, self.append.out),)


def _append_exprs(prefix: str, a: Append) -> dict[str, Expr]:
    out = {f"{prefix}expr": a.expr}
    for d, c in enumerate(a.coords):
        if c.dyn is not None:
            out[f"{prefix}at{d}"] = c.dyn
    return out


def _append_with(prefix: str, a: Append, exprs: dict[str, Expr]) -> Append:
    coords = tuple(
        c._replace(dyn=exprs.get(f"{prefix}at{d}", c.dyn)) if c.dyn is not None else c for d, c in enumerate(a.coords)
    )
    return replace(a, expr=exprs.get(f"{prefix}expr", a.expr), coords=coords)


@dataclass(frozen=True)
class Contract(Op):
    """`acc_j = sum over k of lhs * rhs[j]` in float32, or exactly modulo 2**32, then `out = epilogue`.

    `lhs`, every `rhs` and the accumulators have one type, f32, i32 or u32.

    `k` lists (axis id, extent) of the contracted axes, ids from `CORE_AXIS`. Axes of the domain that only `lhs` uses
    are rows (m), those that only the `rhs` use are columns (n), shared ones are batch axes. `lhs` is the prologue: any
    expression. Each `rhs` is a plain `Load` (possibly a stream operand). k is summed in index order.
    """

    lhs: Expr = None  # type: ignore[assignment]
    rhs: tuple[Expr, ...] = ()
    k: tuple[tuple[int, int], ...] = ()
    epilogue: Expr = None  # type: ignore[assignment]
    kind = "contract"

    def exprs(self) -> dict[str, Expr]:
        return {"lhs": self.lhs, **{f"rhs{j}": r for j, r in enumerate(self.rhs)}, "epilogue": self.epilogue}

    def _with(self, exprs: dict[str, Expr]) -> Self:
        rhs = tuple(exprs.get(f"rhs{j}", r) for j, r in enumerate(self.rhs))
        return replace(self, lhs=exprs.get("lhs", self.lhs), rhs=rhs, epilogue=exprs.get("epilogue", self.epilogue))

    def scope(self, role: str) -> dict[int, int]:
        return super().scope(role) | (dict(self.k) if role != "epilogue" else {})

    def accumulators(self, role: str) -> tuple[Expr, ...]:
        if role != "epilogue":
            return ()
        return tuple(E.acc(j, range(len(self.domain)), self.lhs.dtype) for j in range(len(self.rhs)))

    @property
    def sums(self) -> tuple[str, ...]:
        return (self.lhs.dtype,) * len(self.rhs)

    @property
    def k_axes(self) -> frozenset[int]:
        return frozenset(a for a, _ in self.k)

    def axes(self, role: str) -> tuple[int, ...]:
        """The domain axes of a role: "batch", "m" or "n" (an axis used by neither operand counts as m)."""
        return self._axes[role]

    @functools.cached_property
    def _axes(self) -> dict[str, tuple[int, ...]]:
        left = self.lhs.axes - self.k_axes
        right = frozenset().union(*(r.axes for r in self.rhs)) - self.k_axes
        out: dict[str, tuple[int, ...]] = {"batch": (), "m": (), "n": ()}
        for a in range(len(self.domain)):
            out["batch" if a in left and a in right else "n" if a in right else "m"] += (a,)
        return out


HEAD_AXIS = E.CORE_AXIS
KEY_AXIS = E.CORE_AXIS + 1
APPEND_AXIS = E.CORE_AXIS + 8


@dataclass(frozen=True)
class Attention(Op):
    """Softmax attention over the key axis, with optional in-place cache appends.

    Axes: the domain has batch axes (`batch`), row axes (`rows`: query heads of a group, query positions) and one
    value axis (`column`, extent dv). Core axes: `HEAD_AXIS` (extent `head`, contracted by the scores) and `KEY_AXIS`
    (extent `keys`).  Over these: `q[batch, rows, head]`; `k[batch, key, head]` and `v[batch, key, column]`, plain
    loads; `score[batch, rows, key]` of `Acc(0) = q.k`; p = softmax over the keys of score; `prob` of `Acc(0) = p`
    (a rounding, or Acc itself); `out = epilogue[domain]` of `Acc(0) = sum over keys of prob * v`.

    `limit` (i32, over the batch axes, or None): keys at or beyond it are masked for every row, so that they need not
    be read; it is at least 1. `appends` run first; `k` and `v` then load the appended values. Tasks that share a cache
    element never run on different (batch) points, so an append needs no hop.
    """

    batch: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    column: int = 0
    keys: int = 0
    head: int = 0
    q: Expr = None  # type: ignore[assignment]
    k: Expr = None  # type: ignore[assignment]
    v: Expr = None  # type: ignore[assignment]
    score: Expr = None  # type: ignore[assignment]
    prob: Expr = None  # type: ignore[assignment]
    epilogue: Expr = None  # type: ignore[assignment]
    limit: Expr | None = None
    appends: tuple[Append, ...] = ()
    kind = "attention"

    _ROLES = ("q", "k", "v", "score", "prob", "epilogue")

    def renamed(self, new: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Self:
        return replace(self, batch=new(self.batch), rows=new(self.rows), column=new((self.column,))[0])

    def exprs(self) -> dict[str, Expr]:
        out = {r: getattr(self, r) for r in self._ROLES}
        if self.limit is not None:
            out["limit"] = self.limit
        for j, a in enumerate(self.appends):
            out |= _append_exprs(f"append{j}.", a)
        return out

    def scope(self, role: str) -> dict[int, int]:
        if role.startswith("append"):
            a = self.appends[int(role[6 : role.index(".")])]
            return dict(zip(a.axes, a.window, strict=True))
        return super().scope(role) | {HEAD_AXIS: self.head, KEY_AXIS: self.keys}

    def accumulators(self, role: str) -> tuple[Expr, ...]:
        if role in ("score", "prob"):
            return (E.acc(0, (*self.batch, *self.rows, KEY_AXIS)),)
        return (E.acc(0, range(len(self.domain))),) if role == "epilogue" else ()

    def _with(self, exprs: dict[str, Expr]) -> Self:
        q, k, v, score, prob, epilogue = (exprs.get(r, getattr(self, r)) for r in self._ROLES)
        limit = exprs.get("limit", self.limit)
        appends = tuple(_append_with(f"append{j}.", a, exprs) for j, a in enumerate(self.appends))
        return replace(self, q=q, k=k, v=v, score=score, prob=prob, epilogue=epilogue, limit=limit, appends=appends)

    @functools.cached_property
    def _reads(self) -> frozenset[int]:
        return super()._reads | {a.target for a in self.appends}

    def writes(self) -> tuple[int, ...]:
        return (self.out, *(a.out for a in self.appends))

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return tuple((a.target, a.out) for a in self.appends)


@dataclass(frozen=True)
class Sort(Op):
    """Rows along the last domain axis (extent = row length), sorted stably by `key`; writes `count` elements a row.

    `payload` "values" writes the sorted keys, "indices" their i32 positions. `descending` with `count` < row length
    is top_k. The domain is the *input* row space; `out` has `count` as its last extent.
    """

    key: Expr = None  # type: ignore[assignment]
    payload: str = "values"
    descending: bool = False
    count: int = 0
    kind = "sort"
    details = ("payload", "descending", "count")

    @property
    def row(self) -> int:
        return len(self.domain) - 1

    def exprs(self) -> dict[str, Expr]:
        return {"key": self.key}

    def _with(self, exprs: dict[str, Expr]) -> Self:
        return replace(self, key=exprs.get("key", self.key))


@dataclass(frozen=True)
class Scan(Op):
    """`acc` = `element` combined with all elements before it (`reverse`: behind it) along domain axis `axis`; `out = epilogue`.

    `how` is "sum", "prod", "max", "min" or (f32) "logsumexp". `element` and `acc` have one type, f32, i32 or u32; sums and
    products of integers are exact modulo 2**32. Floats combine in a fixed order that depends on the row's length only.
    """

    element: Expr = None  # type: ignore[assignment]
    how: str = "sum"
    axis: int = 0
    reverse: bool = False
    epilogue: Expr = None  # type: ignore[assignment]
    kind = "scan"
    details = ("how", "axis", "reverse")

    @property
    def row(self) -> int:
        return self.axis

    def renamed(self, new: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Self:
        return replace(self, axis=new((self.axis,))[0])

    @property
    def sums(self) -> tuple[str, ...]:
        return (self.element.dtype,)

    def exprs(self) -> dict[str, Expr]:
        return {"element": self.element, "epilogue": self.epilogue}

    def accumulators(self, role: str) -> tuple[Expr, ...]:
        return (E.acc(0, range(len(self.domain)), self.element.dtype),) if role == "epilogue" else ()

    def _with(self, exprs: dict[str, Expr]) -> Self:
        return replace(self, element=exprs.get("element", self.element), epilogue=exprs.get("epilogue", self.epilogue))


@dataclass(frozen=True)
class Graph:
    """Values by id, operators in program order, the call's operands and results (value ids; a result may repeat)."""

    values: dict[int, Value]
    ops: tuple[Op, ...]
    args: tuple[int, ...]
    results: tuple[int, ...]
    name: str = "fn"

    def with_ops(self, ops: list[Op] | tuple[Op, ...], values: dict[int, Value] | None = None,
                 results: tuple[int, ...] | None = None) -> Graph:  # fmt: skip
        """A graph with these operators; values that nobody names any more are dropped.

        Dynamic coordinates of new operators end with their dimension: what substitution gives as limit is the largest
        value of a coordinate anywhere, also where a piece around the load never takes it.
        """
        values = self.values if values is None else values
        results = self.results if results is None else results
        known = {id(op) for op in self.ops}
        ops = [op if id(op) in known else _limited(op, values) for op in ops]
        live = set(self.args) | set(results)
        for op in ops:
            live |= op.reads() | set(op.writes())
        return Graph({i: v for i, v in values.items() if i in live}, tuple(ops), self.args, results, self.name)

    def producers(self) -> dict[int, Op]:
        return {v: op for op in self.ops for v in op.writes()}

    def consumers(self) -> dict[int, list[Op]]:
        out: dict[int, list[Op]] = {i: [] for i in self.values}
        for op in self.ops:
            for v in op.reads():
                out[v].append(op)
        return out

    def value_name(self, i: int) -> str:
        v = self.values.get(i)
        return v.name if v is not None and v.name else f"%{i}"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _limited(op: Op, values: dict[int, Value]) -> Op:
    """`op` with no dynamic coordinate clamped to more than its dimension has."""

    def beyond(x: E.Load) -> bool:
        return any(c.dyn is not None and c.limit >= n for c, n in zip(x.coords, values[x.value].shape, strict=True))

    def f(x: E.Load) -> E.Expr | None:
        if not beyond(x):
            return None
        shape = values[x.value].shape
        return E.load(
            x.value, tuple(c._replace(limit=min(c.limit, n - 1)) for c, n in zip(x.coords, shape, strict=True)), x.dtype
        )

    exprs = {r: E.substitute_loads(e, f) for r, e in op.exprs().items() if any(beyond(x) for x, _ in E.walk_loads(e))}
    return op.with_exprs(exprs) if exprs else op


class GraphError(Exception):
    """The graph breaks an invariant of the IR: a bug in a pass, named with the operator."""


def check(g: Graph) -> Graph:
    """Verifies the invariants of the IR and returns `g`: definitions before uses, arities, axes in scope, types."""
    if "_checked" in vars(g):
        return g
    defined = {i for i, v in g.values.items() if v.role != "temp"}
    written: set[int] = set()
    consumed: set[int] = set()
    for n, op in enumerate(g.ops):

        def fail(msg: str, op: Op = op, n: int = n) -> NoReturn:
            raise GraphError(f"operator {n} ({op.kind} -> {g.value_name(op.out)}, from {op.source}): {msg}")

        appended = {a.out for a in op.appends} if isinstance(op, Attention) else set()  # appends run first
        for v in op.reads():
            if v not in defined and v not in appended:
                fail(f"reads {g.value_name(v)} before it is defined")
            if v in consumed:
                fail(f"reads {g.value_name(v)} after it was overwritten in place")
        for name, e in op.exprs().items():
            scope = op.scope(name).keys()
            if not e.axes <= scope:
                fail(f"{name} uses axes {sorted(e.axes - scope)} that are not in scope")
            for node, ranges in E.walk_loads(e):
                value = g.values[node.value]
                if len(node.coords) != len(value.shape):
                    fail(f"{name} loads {value} with {len(node.coords)} coordinates")
                if node.dtype != compute_dtype(value.dtype):
                    fail(f"{name} loads {value} as {node.dtype}")
                known = E.UNKNOWN not in ranges and all(x < y for _, x, y in ranges)
                for c, extent in zip(node.coords, value.shape, strict=True):
                    if c.dyn is None and known:
                        lo, hi = E.coord_range(c, ranges)
                        if not (lo >= 0 and hi < extent):
                            fail(f"{name} loads {value} at {coord_text(c, g.value_name)}, outside 0..{extent - 1}")
                    if c.dyn is not None and c.limit >= extent:
                        fail(f"{name} loads {value} with a dynamic coordinate clamped to {c.limit}")
            allowed = op.accumulators(name)
            if any(isinstance(x, E.Acc) and x not in allowed for x in E.walk(e)):
                fail(f"{name} has an accumulator that the core does not have")
        for old, _new in op.inplace():
            consumed.add(old)
        for v in op.writes():
            if v in written or g.values[v].role != "temp":
                fail(f"writes {g.value_name(v)}, which is already defined")
            written.add(v)
            defined.add(v)
    for r in g.results:
        if r not in defined:
            raise GraphError(f"result {g.value_name(r)} is never defined")
        if r in consumed:
            raise GraphError(f"result {g.value_name(r)} was overwritten in place")
    vars(g)["_checked"] = True  # a graph does not change
    return g


SHORT_CONST = 16
"""Elements of a constant that is printed."""


def _lines(g: Graph) -> Iterator[str]:
    """Nothing is lost but the elements of long constants: `jax_mpk.ir.parse` reads it back."""
    name: Callable[[int], str] = g.value_name
    declared = itertools.count()

    def declare(i: int) -> str:
        """With its id where that is not what `parse` gives a named value: how many were declared before it."""
        v = g.values[i]
        return f"{v.name}%{i}{str(v).removeprefix(v.name)}" if next(declared) != i and v.name else str(v)

    yield f"graph {g.name}({', '.join(map(declare, g.args))})"
    for v in g.values.values():
        if v.role == "const":
            yield f"  const {declare(v.id)}{_elements(v)}"
    for op in g.ops:
        domain = dict(enumerate(op.domain))
        at = "" if op.store is None else f" at [{_coords(op.store, name, domain)}]"
        source = f"  # {op.source}" if op.source != Source() else ""
        yield f"  {declare(op.out)} = {op.kind}[{axes_text(domain.items())}]{at}{source}"
        yield from (f"      {line}" for line in _body(op, name, declare))
    yield f"  return {', '.join(name(r) for r in g.results)}"


def _elements(v: Value) -> str:
    if v.data is None or v.size > SHORT_CONST:
        return ""
    return f" = [{', '.join(to_text(E.const(x.item(), compute_dtype(v.dtype))) for x in v.data.ravel())}]"


def _coords(coords: tuple[Coord, ...], name: Callable[[int], str], scope: dict[int, int]) -> str:
    return ", ".join(coord_text(c, name, scope) for c in coords)


def _target(a: Append, name: Callable[[int], str]) -> str:
    scope = dict(zip(a.axes, a.window, strict=True))
    return f"to {name(a.target)} at [{_coords(a.coords, name, scope)}], {a.mode} (out of bounds: {a.oob})"


def _body(op: Op, name: Callable[[int], str], declare: Callable[[int], str]) -> Iterator[str]:
    if isinstance(op, Contract):
        yield f"k: {axes_text(op.k)}"
    if isinstance(op, Sort):
        yield f"{'descending' if op.descending else 'ascending'} {op.payload} count {op.count}"
    if isinstance(op, Scan):
        yield f"{'backward' if op.reverse else 'forward'} {op.how} along {axis_name(op.axis)}"
    if isinstance(op, Attention):
        batch, rows = (", ".join(map(axis_name, axes)) for axes in (op.batch, op.rows))
        yield f"batch [{batch}] rows [{rows}] column {axis_name(op.column)} keys k1<{op.keys} head k0<{op.head}"
    exprs = op.exprs()
    if isinstance(op, Update):
        yield _target(op.append, name)
    for n, a in enumerate(op.appends if isinstance(op, Attention) else ()):
        yield f"append {declare(a.out)} over {axes_text(zip(a.axes, a.window, strict=True))} {_target(a, name)}"
        role = f"append{n}.expr"
        yield f"{role}: {to_text(exprs.pop(role), name, op.scope(role))}"
    for role, e in exprs.items():
        if ".at" not in role and not role.startswith("at"):  # those are in the coordinates
            yield f"{role}: {to_text(e, name, op.scope(role))}"
