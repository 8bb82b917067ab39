"""Flat nests whose threads take several neighbours at a time: 16 bytes a load and store where memory is contiguous.

Memory is waited for once for all of a thread's points, and what does not depend on the neighbour is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jax_mpk.backends.cuda.expressions import Printer, roots_of
from jax_mpk.backends.cuda.space import Loop
from jax_mpk.ir.body import Nest
from jax_mpk.ir.expr import Acc, Const, Expr, Load
from jax_mpk.ir.graph import itemsize
from jax_mpk.ir.opcodes import alias
from jax_mpk.ir.place import Place

if TYPE_CHECKING:
    from jax_mpk.backends.cuda.nest import Writer

BYTES = 16
"""Bytes of a load."""
FLIGHT, HEAVY = 16, 8
"""Points that a thread has in flight, and those of a nest of more than `NODES` nodes: registers are what they take."""
NODES = 16


def runs(x: Loop, n: int) -> bool:
    """Whether a loop consists of whole runs of `n` neighbours along one axis, each starting at a multiple of `n`."""
    return len(x.axes) == 1 and x.count.isdigit() and int(x.count) % n == 0 and x.grain % n == 0


def innermost(p: Printer, loops: Sequence[Loop]) -> int:
    """The id of the axis of the last loop, which runs over one axis."""
    return next(a for a, n in p.number.items() if n == loops[-1].axes[0])


def is_run(w: Writer, p: Printer, x: Place, axis: int, n: int) -> bool:
    """Whether the elements of `n` neighbours along `axis` (an id) are contiguous, and aligned to their size."""
    m = p.scratch.get(x.slot)
    strides = dict(x.strides)
    if strides.pop(axis, 0) != 1 or any(s % n for s in strides.values()) or x.offset % n:
        return False
    if any(stride % n or axis in e.axes for e, _, stride in x.dyn):
        return False
    if m is not None:
        whole = m.row0 == "0" and (m.col0 == "0" or m.shared)
        return whole and bool(m.length) and m.ld % n == 0 and m.length % n == 0
    return x.slot in w.aligned


def width(w: Writer, p: Printer, loops: Sequence[Loop], threads: int) -> int:
    """Neighbours that a thread takes at a time; 1 where memory is no run, or that would not keep the threads busy (they need
    not be with a copy, which computes nothing)."""
    store = p.nest.store
    if not loops or w.guards or store.where is not None or store.mode != "set" or len(loops[-1].axes) != 1:
        return 1
    axis = innermost(p, loops)
    loads = [p.nest.place(x) for x in p.order(roots_of(p.nest)) if isinstance(x, Load | Acc)]
    most, idle = math.prod(x.most for x in loops), _is_copy(p, roots_of(p.nest)[0])
    n = BYTES // min(_size(p, x) for x in (store.place, *loads))
    while n > 1:
        largest = max(_size(p, x) for x in (store.place, *(x for x in loads if axis in x.axes)))
        if (n * largest <= 2 * BYTES and (idle or most >= n * threads) and runs(loops[-1], n) and is_run(w, p, store.place, axis, n)
                and all(axis not in x.axes or is_run(w, p, x, axis, n) for x in loads)):  # fmt: skip
            return n
        n //= 2
    return 1


def points(
    w: Writer, p: Printer, loops: Sequence[Loop], rank: str, threads: int, n: int, given: Mapping[Expr, str]
) -> None:
    """Appends all points of `loops`, `n` neighbours a thread, computed and stored. `given`: names of what is known."""
    out, nest, roots = p.out, p.nest, roots_of(p.nest)
    axis = innermost(p, loops)
    nodes = p.order(roots, given)
    known: dict[Expr, frozenset[int]] = {}
    local = {x for x in nodes if axis in p.depends(x, known)}
    loads = [x for x in nodes if isinstance(x, Load | Acc) and x in local]
    before = p.order([e for x in loads for e in _dynamic(nest, x)], given)
    flight = FLIGHT if sum(not isinstance(x, Const) for x in nodes) <= NODES else HEAVY
    batch = max(1, min(flight // n, math.ceil(math.prod(x.most for x in loops) / (n * threads))))
    out(f"const int total = {' * '.join(x.count for x in loops)} / {n};")
    out(f"for (int p0 = {rank}; p0 < total; p0 += {batch * threads}) {{")
    for k, x in enumerate(loads):
        out(f"Wide<{dtype(p, nest.place(x))}, {n}> l{k}[{batch}];")
    if loads:
        out("#pragma unroll")
        out(f"for (int u = 0; u < {batch}; ++u) {{")
        out(f"const int q = min(p0 + u * {threads}, total - 1) * {n};")  # no branch: the loads of all points overlap
        with w.scope():
            w.declare(loops, "q")
        names = dict(given)
        p.block(before, names)
        for k, x in enumerate(loads):
            pointer, at, _ = p.element(nest.place(x), names)
            out(f"l{k}[u].load({pointer}, {at});")
        out("}")
        out("forget();")  # or the compiler moves the last load to its use, behind a branch
    out("#pragma unroll")
    out(f"for (int u = 0; u < {batch}; ++u) {{")
    out(f"const int q = (p0 + u * {threads}) * {n};")
    out(f"if (q >= total * {n}) continue;")
    with w.scope():
        w.declare(loops, "q")
    names = dict(given)
    p.block([x for x in nodes if x not in local], names)
    pointer, at, _ = p.element(nest.store.place, names)
    moved = [k for k, x in enumerate(loads) if x is roots[0] and _is_copy(p, x)]
    if moved:
        out(f"l{moved[0]}[u].store({pointer}, {at});")
        out("}")
        out("}")
        return
    out(f"Wide<{dtype(p, nest.store.place)}, {n}> y;")
    name = f"i{loops[-1].axes[0]}"
    out(f"const int first = {name};")
    out("#pragma unroll")
    out(f"for (int n = 0; n < {n}; ++n) {{")
    out(f"const int {name} = first + n;")
    here = names | {x: f"l{k}[u].get(n)" for k, x in enumerate(loads)}
    p.block([x for x in nodes if x not in here], here)
    out(f"y.set(n, {here[roots[0]]});")
    out("}")
    out(f"y.store({pointer}, {at});")
    out("}")
    out("}")


def _is_copy(p: Printer, x: Expr) -> bool:
    """Whether `x` is an element of memory, of the type that is stored: its bits are moved as they are."""
    return isinstance(x, Load | Acc) and dtype(p, p.nest.place(x)) == dtype(p, p.nest.store.place)


def _dynamic(nest: Nest, x: Load | Acc) -> list[Expr]:
    return [alias(e) for e, _, _ in nest.place(x).dyn]


def dtype(p: Printer, x: Place) -> str:
    """The type in memory of a place."""
    m = p.scratch.get(x.slot)
    return (m.dtype if m else "") or x.dtype.upper()


def _size(p: Printer, x: Place) -> int:
    return itemsize(dtype(p, x).lower())
