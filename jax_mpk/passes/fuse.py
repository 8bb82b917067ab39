"""Pass `fuse`: what is left of the graph is cores; everything else lives in their prologues and epilogues.

A *hop* is one operator on the longest path: results of one operator travel through memory to the next, and that
latency, not arithmetic, is what a small decode step spends its time on. So fusion is decided by hops first:

1. epilogues: a map that is element by element aligned with the only contraction output that it consumes becomes that
   contraction's epilogue (residual adds, activations, casts); contractions with equal left operands that meet in one
   epilogue become one contraction (gate and up); a result that is a view of a core's output is written by the core;
2. appends: a cache update whose only reader is an attention moves into the attention;
3. prologues: every other map is written into its consumers, unless computing it once is free in hops (its inputs are
   known early: a RoPE table) and repeating it would cost more than reading it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from jax_mpk.device import CPU, Device
from jax_mpk.ir import algebra
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr, Load
from jax_mpk.ir.graph import (
    APPEND_AXIS,
    Append,
    Attention,
    Contract,
    Graph,
    Map,
    Op,
    Update,
    itemsize,
)  # fmt: skip
from jax_mpk.passes import results
from jax_mpk.passes.axes import inverse, plain_axis
from jax_mpk.passes.inplace import run as make_inplace_legal
from jax_mpk.passes.simplify import dead, replace_acc
from jax_mpk.passes.split import run as split
from jax_mpk.passes.substitute import at, expand, inline, settle

REPEATS = 16
"""How often a prologue is assumed to be evaluated: once per task of its operator."""
CHEAP = 6.0
"""Cost per element up to which a map is always written into its consumers (a load counts 1)."""
WORTH_KEEPING = 1 << 14
"""Total repeated work (cost units) from which a map is kept when that costs no hop."""
LOADS = 8
"""Values that an inlined map may read; one that reads more is kept, or a chain of residual adds would grow for ever."""
PROLOGUE_BYTES = 192 << 10
"""A target that streams weights keeps a row that its every task would have to read more bytes than this to compute:
beyond it, that takes longer than a hop (an SM reads about 40 kB/us from a cache that all others read too)."""
NODES = 400
"""Nodes of an expression up to which maps are written into the only one that reads them, at all places where it does."""
BOXES = 32
"""Boxes that a map may have for others to be written into it, or it into them: along several axes they multiply, and each
is a loop of the CUDA source."""
REDUCTIONS = 8
"""The same for its reductions: each walks its row again, through everything below it."""
SHARED_NODES = 64
"""Nodes of a map up to which it may be written into several readers: a recurrence that is written out would be computed
from its start by every reader of every step."""
LONG_ROW = 1 << 14
"""Elements of a row whose reduction is not repeated for a reader where it is computed anyway: that takes longer than a hop."""
HOP_CPU, HOP_GPU = 1 << 18, 1 << 22
"""Work (cost units) that all workers do in the time of a hop, which is what computing a map in its reader saves."""
BLOWUP = 4
"""How much more often than necessary a row reduction may be evaluated inside a consumer."""
APPEND_ROWS = 64
"""Attention rows (query heads of a group x positions) up to which appends are done inside the attention tasks."""


def run(g: Graph, target: Device = CPU) -> Graph:
    """The fused graph; `target` decides whether contractions are split over k on the way."""
    g = results.run(_epilogues(g, target))
    g = _appends(g)
    g = split(g, target)
    g = _prologues(g, target)
    return make_inplace_legal(dead(g))


# ------------------------------------------------------------------------------------------------------------ epilogues


def _epilogues(g: Graph, target: Device) -> Graph:
    """Grows every core with accumulators downwards as long as its output has one consumer that is aligned with it."""
    ops: dict[int, Op] = {op.out: op for op in g.ops}  # in program order; a fused operator moves to its map's place
    users = {v: {op.out for op in c} for v, c in g.consumers().items()}
    results = frozenset(g.results)
    level = _levels(g.ops)
    gone: set[int] = set()
    for op in g.ops:
        gone.update(old for old, _ in op.inplace())
        if not isinstance(op, Map) or op.out not in ops:
            continue
        op = _absorb_maps(op, ops, users, results, gone, target)
        ops[op.out] = op
        fused = _fuse_epilogue(op, ops, users, results, level)
        if fused is not None:
            for v in fused.reads():
                users.setdefault(v, set()).add(op.out)
            ops[op.out] = fused
            level[op.out] = 1 + max((level.get(v, 0) for v in fused.reads()), default=0)
    return g.with_ops([op for op in _ordered(g, ops)])


def _ordered(g: Graph, ops: dict[int, Op]) -> list[Op]:
    """Program order: every surviving operator at the place of the operator that wrote its output."""
    return [ops[op.out] for op in g.ops if op.out in ops]


def _levels(ops: tuple[Op, ...]) -> dict[int, int]:
    """Hop level of every value: 0 for operands; maps count as fused away, so only cores and updates count."""
    level: dict[int, int] = {}
    for op in ops:
        here = max((level.get(v, 0) for v in op.reads()), default=0) + (0 if isinstance(op, Map) else 1)
        for v in op.writes():
            level[v] = here
    return level


def _absorb_maps(op: Map, ops: dict[int, Op], users: dict[int, set[int]], results: frozenset[int],
                 gone: set[int], target: Device) -> Map:  # fmt: skip
    """Writes maps that only `op` uses into it."""
    while True:
        table = {}
        for v in op.expr.loads:
            p = ops.get(v)
            if isinstance(p, Map) and users[v] == {op.out} and v not in results and p.store is None:
                if not _computes_again(p, op, target):
                    table[v] = p.expr
        new = inline(op, table, gone) if table else op
        assert isinstance(new, Map)
        done = {v for v in table if v not in new.expr.loads}
        if not done or _too_large(new.expr) or _blows_up(new.expr, dict(enumerate(new.domain))):
            return op
        if algebra.boxes(new.expr) > max(BOXES, algebra.boxes(op.expr)):
            return op
        for v in done:
            for u in ops[v].reads():
                users[u].discard(v)
                users[u].add(op.out)
            del ops[v]
        op = new


def _too_large(e: Expr) -> bool:
    """More nodes or reductions than a code should have. The parts of a piece are codes of their own and share nothing."""
    below = E.walk(e)
    parts = [E.walk(p) for x in below if isinstance(x, E.Piece) for p in x.parts]
    if len(below) > NODES or sum(map(len, parts)) > 8 * NODES or _reductions(below) > REDUCTIONS:
        return True
    return sum(map(_reductions, parts)) > 4 * REDUCTIONS


def _reductions(nodes: Iterable[Expr]) -> int:
    return sum(isinstance(x, E.Reduce) for x in nodes)


def _fuse_epilogue(op: Map, ops: dict[int, Op], users: dict[int, set[int]], results: frozenset[int],
                   level: dict[int, int]) -> Op | None:  # fmt: skip
    """`op` as the epilogue of a core whose output only it uses, with further contractions merged in."""
    loads: dict[int, set[Load]] = {}
    inside_reduction: frozenset[int] = frozenset()
    for x in E.walk(op.expr):
        if isinstance(x, Load):
            loads.setdefault(x.value, set()).add(x)
        elif isinstance(x, E.Reduce):
            inside_reduction |= x.loads
    cores: list[tuple[Op, Load, tuple[Coord, ...]]] = []
    for v, found in loads.items():
        c = ops.get(v)
        if c is None or not c.sums or c.store is not None or users[v] != {op.out} or v in results:
            continue
        if len(found) != 1 or v in inside_reduction:
            continue
        x = next(iter(found))
        back = inverse(x.coords, op.domain, c.domain) if op.store is None else None
        if back is not None and not _cuts(back, c.row):
            cores.append((c, x, back))
    if not cores:
        return None
    # The last contraction takes the epilogue, so that everything else that it reads has been computed.
    first, x, back = cores[0]
    group = [(c, y) for c, y, b in cores if c is first or (b == back and _together(first, c))]
    if len(group) > 4 or sum(len(c.sums) for c, _ in group) > 4:
        group = group[:1]
    others = [v for v in op.expr.loads if all(v != c.out for c, _ in group)]
    ready = max((level.get(v, 0) for c, _ in group for v in c.reads()), default=0)
    if any(level.get(v, 0) > ready for v in others):
        return None  # waiting for the other operand would cost a hop
    sums: list[str] = []
    aligned: dict[Expr, Expr] = {}
    point = dict(enumerate(back))
    try:
        for c, y in group:
            accs = [E.acc(len(sums) + j, range(len(first.domain)), t) for j, t in enumerate(c.sums)]
            aligned[E.substitute_axes(y, point)] = replace_acc(c.exprs()["epilogue"], accs)
            sums += c.sums
        body = E.substitute_axes(op.expr, point)
    except E.NotAffine:
        return None
    if first.row is not None and _repeats(body, first):
        return None
    body = algebra.simplify(E.substitute_loads(body, aligned.get))
    for c, _ in group:
        for v in c.reads():
            users[v].discard(c.out)
        del ops[c.out]
    store = None if op.domain == first.domain and _is_identity(back) else back
    new = replace(first, out=op.out, store=store).with_exprs({"epilogue": body})
    if not isinstance(new, Contract):
        return new
    return replace(new, rhs=tuple(r for c, _ in group if isinstance(c, Contract) for r in c.rhs))


def _cuts(store: tuple[Coord, ...], row: int | None) -> bool:
    """Whether coordinates go by digits of the row of a core, which stays whole whatever order memory gets."""
    return any(t.axis == row and (t.div != 1 or t.mod) for c in store for t in c.terms)


def _together(x: Op, y: Op) -> bool:
    """Whether two cores are contractions that can be one."""
    if not isinstance(x, Contract) or not isinstance(y, Contract):
        return False
    return x.lhs is y.lhs and x.k == y.k and x.domain == y.domain


def _is_identity(coords: tuple[Coord, ...]) -> bool:
    return all(plain_axis(c) == a or c == Coord() for a, c in enumerate(coords))


# -------------------------------------------------------------------------------------------------------------- appends


def _appends(g: Graph) -> Graph:
    """Moves cache updates into the one attention that reads them; other updates may follow (one array for all layers)."""
    readers = {v: [op.out for op in c if not _overwrites(op, v)] for v, c in g.consumers().items()}
    updates = {op.out: op for op in g.ops if isinstance(op, Update)}
    maps = {op.out: op for op in g.ops if isinstance(op, Map)}
    taken: set[int] = set()
    ops: list[Op] = []
    for op in g.ops:
        if isinstance(op, Attention) and math.prod(op.domain[a] for a in op.rows) <= APPEND_ROWS:
            for x in (op.k, op.v):
                assert isinstance(x, Load)
                u = updates.get(x.value)
                if u is None or readers[x.value] != [op.out] or x.value in taken:
                    continue
                indices = {r: expand(e, maps) for r, e in u.exprs().items() if r != "expr"}
                moved = settle(u.with_exprs(indices))
                assert isinstance(moved, Update)
                append = _linked(op, moved.append, x, len(op.appends))
                if append is not None:
                    op = replace(op, appends=(*op.appends, append))
                    taken.add(x.value)
        ops.append(op)
    return g.with_ops([op for op in ops if not (isinstance(op, Update) and op.out in taken)])


def _overwrites(op: Op, v: int) -> bool:
    """Whether `op` uses `v` as the target of an update in place and for nothing else."""
    return isinstance(op, Update) and op.append.target == v and not any(v in e.loads for e in op.exprs().values())


def _linked(op: Attention, a: Append, x: Load, number: int) -> Append | None:
    """The append on the attention's axes: every batch axis must run along with a window dimension.

    Then two tasks (two batch points) never touch the same row of the cache.
    """
    if a.mode != "set":
        return None
    link: dict[int, int] = {}
    for cache, window in zip(x.coords, a.coords, strict=True):
        axis, w = plain_axis(cache), plain_axis(window)
        if axis in op.batch and w is not None and a.window[w] == op.domain[axis]:
            link[w] = axis
        elif cache.axes() & frozenset(op.batch):
            return None
    if {b for b in op.batch if op.domain[b] > 1} - set(link.values()):
        return None
    fresh = APPEND_AXIS + 4 * number
    point, axes = {}, []
    for w, n in enumerate(a.window):
        axis = link.get(w)
        if axis is None:
            axis, fresh = fresh, fresh + 1
        axes.append(axis)
        point[w] = E.coord_axis(axis, n)
    coords = tuple(E.coord_substitute(c, point, lambda e: E.substitute_axes(e, point)) for c in a.coords)
    return replace(a, axes=tuple(axes), expr=E.substitute_axes(a.expr, point), coords=coords)


# ------------------------------------------------------------------------------------------------------------ prologues


def _prologues(g: Graph, target: Device) -> Graph:
    """Decides for every load of a map's value whether to write the map there or to read what it has stored.

    One map may be written into one consumer, which would otherwise wait a hop longer, and be read by another, for
    which it is ready in time (the residual stream, when contractions are split).
    """
    ready: dict[int, int] = {}  # hop level at which a value is known; of a map, before it is stored
    maps: dict[int, Map] = {}
    gone: set[int] = set()
    ops: list[Op] = []
    users = {v: len(c) for v, c in g.consumers().items()}
    for op in g.ops:
        own = {v: maps[v].expr for v in op.reads() if v in maps and _inlines(g, maps[v], op, ready, users, target)}
        op = _written(op, own, gone)
        gone.update(old for old, _ in op.inplace())
        here = max((ready.get(v, 0) + (v in maps) for v in op.reads()), default=0)
        for v in op.writes():
            ready[v] = here if isinstance(op, Map) else here + 1
        ops.append(op)
        if isinstance(op, Map) and op.store is None:
            maps[op.out] = op
    return dead(g.with_ops(ops))


def _written(op: Op, table: dict[int, Expr], gone: set[int]) -> Op:
    """`op` with the maps of `table` written into it, the small ones first, as many as its codes have room for."""
    new = inline(op, table, gone)
    if not any(_too_large(e) for e in new.exprs().values()):
        return new
    new = inline(op, {v: e for v, e in table.items() if algebra.is_view(e)}, gone)
    for v in sorted(table, key=lambda v: len(E.walk(table[v]))):
        larger = inline(new, {v: table[v]}, gone)
        if not any(_too_large(e) for e in larger.exprs().values()):
            new = larger
    return new


def _inlines(g: Graph, m: Map, user: Op, ready: dict[int, int], users: dict[int, int], target: Device) -> bool:
    """True if `user` should compute the map itself."""
    e = m.expr
    places = _places(user, m.out)
    if (boxes := algebra.boxes(e)) > 1:
        there = max(algebra.boxes(x) for x in user.exprs().values())
        if max(places, there) > 1 and boxes * max(places, there) > BOXES:
            return False
    if algebra.is_view(e):
        return True
    if len(e.loads) > LOADS or _too_large(e) or _reduces_badly(e, m, user):
        return False
    if users[m.out] > 1 and len(E.walk(e)) > SHARED_NODES:
        return False
    if places * len(E.walk(e)) > NODES:
        return False
    if (users[m.out] > 1 or m.out in g.results) and _longest(e) > LONG_ROW:
        return False
    if e.cost <= CHEAP and not e.height:
        return True
    if _computes_again(m, user, target):
        return False
    if target.gpu and isinstance(user, Contract) and e.height and _bytes(g, m) > PROLOGUE_BYTES:
        return False
    # Reading it costs no hop if the user waits for something that is at least as late anyway.
    if max((ready.get(v, 0) for v in user.reads() if v != m.out), default=0) < ready[m.out] + 1:
        return True
    return REPEATS * users[m.out] * math.prod(m.domain) * e.cost < WORTH_KEEPING


def _longest(e: Expr) -> int:
    """Elements of the longest row that is reduced."""
    return max((math.prod(x.extents) for x in E.walk(e) if isinstance(x, E.Reduce)), default=0)


def _places(user: Op, value: int) -> int:
    """At how many places an operator reads a value: the neighbours in a window, each of which would be computed."""
    return len({x for e in user.exprs().values() if value in e.loads for x in E.walk(e)
                if isinstance(x, Load) and x.value == value})  # fmt: skip


def _bytes(g: Graph, m: Map) -> int:
    """Bytes that a task reads to compute all of `m`: every load of it, inside and outside its reductions."""
    return math.prod(m.domain) * sum(itemsize(g.values[x.value].dtype) for x in E.walk(m.expr) if isinstance(x, Load))


def _reduces_badly(e: Expr, op: Map, user: Op) -> bool:
    """Would writing `e` into `user` evaluate a reduction far more often than once per row?"""
    if not e.height:
        return False
    for role, f in user.exprs().items():
        for x in E.walk(f):
            if isinstance(x, Load) and x.value == op.out:
                try:
                    new = at(e, x.coords)
                except E.NotAffine:
                    return True
                scope = _evaluated(user, role, f)
                again = _repeats(new, user) if user.row is not None else _blows_up(new, scope)
                if again or _nested(f, x, new):
                    return True
    return False


def _computes_again(m: Map, user: Op, target: Device) -> bool:
    """Whether `user` would compute elements of `m` again and again, for points of outer axes that `m` does not have, with more
    work than a hop is worth. What goes by outer axes alone is computed once for all inner ones."""
    if m.expr.cost <= CHEAP:
        return False
    work = 0.0
    todo = [(f, dict(_evaluated(user, role, f))) for role, f in user.exprs().items() if m.out in f.loads]
    while todo:
        f, scope = todo.pop()
        for x in _readers(f, m.out):
            used = sorted(a for a, n in scope.items() if n > 1)
            outer = used[: max((n + 1 for n, a in enumerate(used) if a in x.axes), default=0)]
            if isinstance(x, E.Reduce):
                todo.append((x.body, {a: scope[a] for a in outer} | dict(zip(x.bound, x.extents, strict=True))))
                continue
            again = math.prod(scope[a] for a in outer if a not in x.axes)
            if again > BLOWUP:
                work += again * math.prod(scope[a] for a in outer if a in x.axes) * m.expr.cost
    return work > (HOP_GPU if target.gpu else HOP_CPU)


def _readers(e: Expr, value: int) -> Iterator[Load | E.Reduce]:
    """The loads of a value, and instead of those inside of reductions these."""
    todo, seen = [e], {e}
    while todo:
        x = todo.pop()
        if isinstance(x, Load | E.Reduce):
            if isinstance(x, E.Reduce) or x.value == value:
                yield x
            if isinstance(x, E.Reduce):
                continue
        below = {a for a in x.args() if value in a.loads} - seen
        seen |= below
        todo += below


def _evaluated(user: Op, role: str, f: Expr) -> Mapping[int, int]:
    """The axes over which an operator evaluates a side: a core those of the side only."""
    scope = user.scope(role)
    return scope if isinstance(user, Map | Update) else {a: n for a, n in scope.items() if a in f.axes}


def _repeats(e: Expr, user: Op) -> bool:
    """The same for a core that takes one row after the other, and evaluates all of `e` for each of them."""
    batch = [a for a in range(len(user.domain)) if a != user.row]
    for r in E.walk(e):
        if isinstance(r, E.Reduce):
            if math.prod(user.domain[a] for a in batch if a not in r.axes) > BLOWUP:
                return True
            if any(isinstance(s, E.Reduce) and s.axes & frozenset(r.bound) for s in E.walk(r.body)):
                return True  # a reduction per element of a reduction
    return False


def _nested(f: Expr, x: Load, new: Expr) -> bool:
    """Would `new` in place of the load `x` put a reduction inside another one that it depends on?"""
    own = [r.axes for r in E.walk(new) if isinstance(r, E.Reduce)]
    around = [frozenset(r.bound) for r in E.walk(f) if isinstance(r, E.Reduce) and x.value in r.loads]
    return any(axes & bound for axes in own for bound in around)


def _blows_up(e: Expr, scope: Mapping[int, int]) -> bool:
    """Whether something is reduced again and again where `e` is evaluated for all of `scope` (axis -> extent): a reduction
    that depends on the innermost of the axes, but not on some outer one; or one for every element of another."""
    if not e.height:
        return False
    used = sorted(a for a, n in scope.items() if n > 1)
    for r in E.walk(e):
        if isinstance(r, E.Reduce):
            last = max((n for n, a in enumerate(used) if a in r.axes), default=0)
            if math.prod(scope[a] for a in used[:last] if a not in r.axes) > BLOWUP:
                return True
            if any(isinstance(s, E.Reduce) and s.axes & frozenset(r.bound) for s in E.walk(r.body)):
                return True
    return False
