"""What XLA does: its kernels as `Piece`s, guessed from the jaxpr alone.

Element-wise equations that feed each other are one kernel (a *group*); contractions, reductions, sorts, scatters and the
like are kernels of their own, which read their operands, or what a group in front of them would. This is coarser than
XLA's own fusion, in both directions, and takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_mpk import _compat
from jax_mpk.predict.piece import Piece

FREE = frozenset(
    "reshape squeeze expand_dims broadcast_in_dim iota copy stop_gradient slice split unstack optimization_barrier "
    "sharding_constraint reshard device_put random_wrap random_unwrap random_clone pvary empty empty2".split()
)
"""Nothing, or a change of indices, in the kernel of a neighbour."""
PARTIAL = frozenset("slice split unstack dynamic_slice gather".split())
"""What reads no more of its first operand than it writes."""
COSTS = dict.fromkeys(
    "exp exp2 expm1 log log1p tanh sin cos tan logistic erf erf_inv erfc pow atan2 cbrt sinh cosh asin acos atan asinh "
    "acosh atanh lgamma digamma".split(), 8
) | dict.fromkeys("random_bits random_fold_in random_split threefry2x32".split(), 80)  # fmt: skip
"""Scalar work, where that of an addition is 1."""
REDUCE = ("reduce_", "argmax", "argmin")
KERNELS = {
    "sort": "sort", "top_k": "top_k", "approx_top_k": "top_k", "conv_general_dilated": "conv", "fft": "fft", "while": "other",
    "select_and_scatter_add": "window", "select_and_gather_add": "window", "ragged_dot_general": "other",
}  # fmt: skip
"""Kernels of their own, but for those with a rule of their own below, and how they are paid."""
CUMULATIVE = 8
"""Scalar work of a cumulative sum an element: it is done in several kernels."""
TRIPS = 16
"""Iterations of a loop of unknown length."""
CONTROL = ("scan", "while", "cond", "shard_map")
BITWISE = frozenset("reduce_precision".split())


@dataclass(frozen=True)
class _Equation:
    """An equation with its operands (-1: a literal) and results as numbers of values, run `times` times."""

    eqn: Any
    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    times: int

    @property
    def fusible(self) -> bool:
        return not (self.name in KERNELS or _is_reduction(self.name) or _alone(self.name))


def _is_reduction(name: str) -> bool:
    return name == "reduce" or (
        name.startswith(REDUCE) and name not in BITWISE and not name.startswith("reduce_window")
    )


def _alone(name: str) -> bool:
    return (
        name in ("dot_general", "dynamic_update_slice")
        or name.startswith(("scatter", "reduce_window", "cum"))
        or name in LINEAR_ALGEBRA
    )


LINEAR_ALGEBRA = frozenset(
    "cholesky lu qr geqrf householder_product triangular_solve eigh eig svd schur tridiagonal tridiagonal_solve lu_pivots_to_permutation "
    "hessenberg custom_linear_solve linear_solve".split()
)


def size(v: Any) -> int:
    """Elements of a variable or literal."""
    return math.prod(getattr(v.aval, "shape", ()))


def nbytes(v: Any) -> int:
    """Bytes of a variable or literal."""
    dtype = getattr(v.aval, "dtype", None)
    return size(v) * (dtype.itemsize if isinstance(dtype, np.dtype) else 8)


def pieces(jaxpr: Any) -> tuple[Piece, ...]:
    """The kernels of a jaxpr, groups last."""
    flat = _Flat()
    jaxpr = _compat.open_jaxpr(jaxpr)[0]
    results = flat.walk(jaxpr, [flat.new(v) for v in jaxpr.invars], 1)
    return tuple(flat.kernels({r for r in results if r >= 0}))


class _Flat:
    """A jaxpr with its calls written out. `avals`: a variable of every value's type; `loops`: pieces of loops."""

    def __init__(self) -> None:
        self.variables: list[Any] = []
        self.equations: list[_Equation] = []
        self.pieces: list[Piece] = []

    def new(self, v: Any) -> int:
        self.variables.append(v)
        return len(self.variables) - 1

    def walk(self, jaxpr: Any, ins: Sequence[int], times: int) -> list[int]:
        """Appends the equations of a jaxpr, and gives its results."""
        jaxpr = _compat.open_jaxpr(jaxpr)[0]
        value: dict[Any, int] = dict(zip(jaxpr.invars, ins, strict=False))
        read: Callable[[Any], int] = lambda a: (
            -1 if _compat.is_literal(a) else value[a] if a in value else value.setdefault(a, self.new(a))
        )
        for eqn in jaxpr.eqns:
            name, operands, inner = eqn.primitive.name, [read(a) for a in eqn.invars], _compat.subjaxprs(eqn)
            if name in _compat.CALLS and inner and len(_compat.open_jaxpr(inner[0])[0].invars) == len(operands):
                outs = self.walk(inner[0], operands, times)
            elif name in CONTROL and inner:
                outs = self._control(eqn, name, inner, times)
            else:
                outs = [self.new(v) for v in eqn.outvars]
                self.equations.append(_Equation(eqn, name, tuple(operands), tuple(outs), times))
            value.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _control(self, eqn: Any, name: str, inner: list[Any], times: int) -> list[int]:
        """A loop's body as often as it runs; of a condition the branch with the fewest equations, since it may be that one.
        What goes in and out is in memory."""
        trips = int(eqn.params["length"]) if name == "scan" else TRIPS if name == "while" else 1
        if name == "cond":
            inner = [min(inner, key=lambda j: len(_compat.open_jaxpr(j)[0].eqns))]
        for j in inner:
            body = _compat.open_jaxpr(j)[0]
            kept = self.walk(body, [self.new(v) for v in body.invars], times * trips)
            self.equations.append(_Equation(None, "keep", tuple(k for k in kept if k >= 0), (), 0))
        self.pieces.append(Piece("loop", name, count=times * trips))
        return [self.new(v) for v in eqn.outvars]

    def kernels(self, results: set[int]) -> list[Piece]:
        """The pieces of what is needed for the results."""
        equations = self._live(results)
        users: dict[int, list[int]] = {}
        maker: dict[int, int] = {}
        for n, e in enumerate(equations):
            for v in e.ins:
                users.setdefault(v, []).append(n)
            maker.update(dict.fromkeys(e.outs, n))
        group = _groups(equations, maker)
        out = list(self.pieces)
        for e in equations:
            if e.eqn is not None and not e.fusible:
                made = [v >= 0 and v in maker and equations[maker[v]].fusible for v in e.ins]
                out.append(_kernel(e, made))
        members: dict[int, list[int]] = {}
        for n, e in enumerate(equations):
            if e.eqn is not None and e.fusible:
                members.setdefault(group[n], []).append(n)
        out += [
            p for m in members.values() if (p := self._group(equations, m, group, users, maker, results)) is not None
        ]
        return out

    def _live(self, results: set[int]) -> list[_Equation]:
        needed, live = set(results), []
        for e in reversed(self.equations):
            if e.eqn is None or needed.intersection(e.outs):
                needed.update(e.ins)
                live.append(e)
        return live[::-1]

    def _group(self, equations: list[_Equation], members: list[int], group: list[int], users: dict[int, list[int]],
               maker: dict[int, int], results: set[int]) -> Piece | None:  # fmt: skip
        """The kernel of a group; None for one that is only a change of indices."""
        own = {v for n in members for v in equations[n].outs}
        reads: dict[int, int] = {}
        work = written = 0
        moves = fused = seen = False
        for n in members:
            e = equations[n]
            for k, v in enumerate(e.ins):
                if v >= 0 and v not in own:
                    full = nbytes(self.variables[v])
                    part = sum(map(nbytes, e.eqn.outvars)) if e.name in PARTIAL and k == 0 else full
                    reads[v] = min(full, reads.get(v, 0) + part)
            cost = 0 if e.name in FREE else COSTS.get(e.name, 1)
            work += cost * max(map(size, e.eqn.outvars), default=0)
            moves |= e.name not in FREE and e.name != "transpose"
            for v in e.outs:
                others = [equations[u] for u in users.get(v, ()) if group[u] != group[n]]
                escapes = v in results or any(not _is_reduction(o.name) for o in others)
                fused |= bool(others) and not escapes
                seen |= v in results or any(o.eqn is None or o.name != "dot_general" for o in others)
                written += nbytes(self.variables[v]) if escapes else 0
        if not moves and not (seen and any(equations[n].name == "transpose" for n in members)):
            return None  # contractions read transposed
        last = equations[members[-1]]
        times = max(equations[n].times for n in members)
        how = "fusion" if written or not fused else "fused"
        return Piece(how, f"{last.name} of {len(members)}", sum(reads.values()), written, 0, 1, work, count=times)


def _groups(equations: list[_Equation], maker: dict[int, int]) -> list[int]:
    """Per equation the number of its group."""
    parent = list(range(len(equations)))

    def find(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for n, e in enumerate(equations):
        for v in e.ins if e.eqn is not None and e.fusible else ():
            m = maker.get(v, -1) if v >= 0 else -1
            if m >= 0 and equations[m].eqn is not None and equations[m].fusible and equations[m].times == e.times:
                parent[find(n)] = find(m)
    return [find(n) for n in range(len(equations))]


def _kernel(e: _Equation, made: Sequence[bool]) -> Piece:
    """The piece of an equation that is a kernel of its own. `made`: which operands a group in front of it makes."""
    ins = [v for v in e.eqn.invars]
    read = sum(nbytes(v) for v in ins)
    written, points = sum(map(nbytes, e.eqn.outvars)), sum(map(size, ins))
    if e.name == "dot_general":
        return _dot(e, read, written)
    if _is_reduction(e.name):
        own = sum(nbytes(v) for v, m in zip(ins, made, strict=True) if not m)
        first = ins[0]
        axes = e.eqn.params.get("axes", ())
        inner = bool(axes) and max(axes) == len(first.aval.shape) - 1
        how = "argmax" if e.name.startswith("arg") else "reduce" if inner else "reduce outer"
        return Piece(how, e.name, own, written, 0, 1, size(first), count=e.times)
    if e.name == "dynamic_update_slice":  # in place
        return Piece("fusion", e.name, nbytes(ins[1]), nbytes(ins[1]), 0, 1, size(ins[1]), count=e.times)
    if e.name.startswith("scatter"):
        return Piece("scatter", e.name, nbytes(ins[-1]), nbytes(ins[-1]), 0, 1, size(ins[-1]), count=e.times)
    if e.name == "conv_general_dilated":
        work = size(e.eqn.outvars[0]) * size(ins[1]) // max(1, e.eqn.outvars[0].aval.shape[_features(e)])
        how = "grouped" if e.eqn.params["feature_group_count"] > 1 else "conv"
        return Piece(how, e.name, read, written, work, count=e.times)
    if e.name == "sort":
        length = ins[0].aval.shape[e.eqn.params["dimension"]] if ins[0].aval.shape else 1
        return Piece("sort", e.name, read, written, 0, 1, int(points * math.log2(max(2, length))), count=e.times)
    if e.name.startswith("cum"):
        return Piece("cumulative", e.name, read, written, 0, 1, CUMULATIVE * points, count=e.times)
    if e.name.startswith("reduce_window"):
        window = math.prod(e.eqn.params["window_dimensions"])
        return Piece("window", e.name, read, written, 0, 1, size(e.eqn.outvars[0]) * window, count=e.times)
    return Piece(KERNELS.get(e.name, "other"), e.name, read, written, 0, 1, points, count=e.times)


def _features(e: _Equation) -> int:
    spec = e.eqn.params["dimension_numbers"].out_spec
    return int(spec[1])


def _dot(e: _Equation, read: int, written: int) -> Piece:
    (left, _), (batch, other_batch) = e.eqn.params["dimension_numbers"]
    shape, other = e.eqn.invars[0].aval.shape, e.eqn.invars[1]
    k, b = math.prod(shape[a] for a in left), math.prod(shape[a] for a in batch)
    m = math.prod(shape) // max(1, k * b)
    n = size(other) // max(1, k * b)
    how = f"dot {np.dtype(other.aval.dtype).name}"
    if b > 1:
        leads = all(tuple(axes) == tuple(range(len(axes))) for axes in (batch, other_batch))
        how = "batched" if leads else "batched strided"
    return Piece(how, f"{e.name} {b} x {m} x {k} x {n}", read, written, b * m * n * k, min(m, n), 0, count=e.times)
