"""`lower`: a jaxpr becomes an op graph, one simple operator an equation. The passes fuse them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jax_mpk import _compat
from jax_mpk.abi import MAX_EXTENT
from jax_mpk.errors import Gap, UnsupportedError
from jax_mpk.frontend.builder import DEAD, Builder, Equation, Tensor, short
from jax_mpk.frontend.registry import EMPTY, MOVES, RULES, Rule
from jax_mpk.frontend.shape import pick, stacked
from jax_mpk.ir import expr as E
from jax_mpk.ir.graph import Graph, Source, check, compute_dtype
from jax_mpk.passes import inplace


def lower(closed_jaxpr: Any, *, name: str = "fn", platform: str = "cpu") -> Graph:
    """The op graph of a closed jaxpr (`jax.make_jaxpr(f)(*args)`), for a platform ("cpu" or "cuda").

    Operands become values of role "arg" in order; closed-over arrays become values of role "const" with their data.
    Every result is a value of its own, written by an operator. The graph satisfies `graph.check`.

    Raises:
      UnsupportedError: primitives, parameters or element types that megakernels do not do; it names each of them, with
        the operand types and the user's line (arguments and results: with their names).
    """
    b = Builder(platform)
    lowering = _Lowering(b)
    b.inline = lowering.inline
    jaxpr, consts = _compat.open_jaxpr(closed_jaxpr)
    args = [lowering.argument(n, var, called) for n, (var, called) in
            enumerate(zip(jaxpr.invars, _compat.argument_names(jaxpr), strict=True))]  # fmt: skip
    outs = lowering.inline((jaxpr, consts), args, [True] * len(jaxpr.outvars))
    for n, (t, var, called) in enumerate(zip(outs, jaxpr.outvars, _compat.result_names(jaxpr), strict=True)):
        if 0 in t.shape:
            lowering.gaps[Gap("result", "it has no elements", f"{called or n}: {short(var.aval)}")] = None
    if lowering.gaps:
        raise UnsupportedError.of(lowering.gaps)
    results: list[int] = []
    for t in outs:
        if t.splat is not None or b.values[t.value].role != "temp" or t.value in results:
            t = b.copy(t)
        results.append(t.value)
    g = Graph(b.values, tuple(b.ops), tuple(a.value for a in args), tuple(results), name)
    return check(inplace.run(_live(g)))


def gaps(closed_jaxpr: Any, *, platform: str = "cpu") -> dict[int, tuple[Gap, ...]]:
    """The equations of a closed jaxpr that `lower` refuses, by number, and why. What their results would have been is taken
    for granted by the others."""
    b = Builder(platform)
    lowering = _Lowering(b)
    b.inline = lowering.inline
    jaxpr, consts = _compat.open_jaxpr(closed_jaxpr)
    env: dict[Any, Tensor] = {v: lowering.argument(n, v, "") for n, v in enumerate(jaxpr.invars)}
    env.update((v, lowering.constant(v, c)) for v, c in zip(jaxpr.constvars, consts, strict=True))
    found: dict[int, tuple[Gap, ...]] = {}
    for n, eqn in enumerate(jaxpr.eqns):
        lowering.gaps = {}
        name, blind = eqn.primitive.name, [v for v in eqn.invars if not _compat.is_literal(v) and env[v] is UNTYPED]
        live = tuple(not _compat.is_dropped(v) for v in eqn.outvars)
        try:
            env.update(zip(eqn.outvars, lowering.equation(eqn, env, live, ""), strict=True))
        except Exception as e:  # an operand is a stand-in, which no rule has to understand
            if not found:
                raise
            lowering.gaps[Gap(name, str(e), where=_compat.user_where(eqn))] = None
            env.update((v, lowering.stand_in(v)) for v in eqn.outvars)
        if blind and not lowering.gaps:
            types = ", ".join(short(v.aval) for v in blind)
            lowering.gaps[Gap(name, "its operands are no arrays of a kernel", types, _compat.user_where(eqn))] = None
        if lowering.gaps:
            found[n] = tuple(lowering.gaps)
    return found


KEY_WORDS = 2
"""Words of a Threefry key."""
_NO_TYPE: tuple[tuple[int, ...], str] = ((), "f32")
UNTYPED = Tensor((), "f32", splat=DEAD.splat)
"""Stands for a value of a type that kernels do not have, which is a gap already."""


class _Lowering:
    """The walk over equations; the rules do the rest. What a rule refuses becomes a gap, and a stand-in of the right type
    takes the place of its results, so that the walk goes on and finds the other gaps."""

    def __init__(self, b: Builder):
        self.b = b
        self.gaps: dict[Gap, None] = {}  # in order, each once
        self.types: dict[Any, tuple[tuple[int, ...], str]] = {}

    def type_of(self, atom: Any) -> tuple[tuple[int, ...], str]:
        """(shape, dtype name) of a variable; raises `UnsupportedError` for tensors that kernels do not have."""
        aval = atom.aval
        key = (getattr(aval, "shape", None), getattr(aval, "dtype", None))
        hit = self.types.get(key)
        if hit is not None:
            return hit
        if key[0] is None or key[1] is None:
            self.b.unsupported(f"a value of type {aval} is not an array")
        if not all(isinstance(n, int) for n in key[0]):
            self.b.unsupported(f"the shape of {aval} is not static")
        shape = tuple(int(n) for n in key[0])
        if max(shape, default=0) > MAX_EXTENT:
            self.b.unsupported(f"{aval} has a dimension of more than {MAX_EXTENT}")
        words = _compat.key_width(key[1])
        shape, dtype = ((*shape, words), "u32") if words else (shape, self.b.dtype(key[1]))
        self.types[key] = shape, dtype
        return shape, dtype

    def argument(self, n: int, var: Any, called: str) -> Tensor:
        """The value of argument `n`."""
        try:
            shape, dtype = self.type_of(var)
            if 0 in shape:
                self.b.unsupported("it has no elements")
        except UnsupportedError as e:
            self.gaps[Gap("argument", e.reason, f"{called or n}: {short(var.aval)}")] = None
            return UNTYPED
        return Tensor(shape, dtype, self.b.value(shape, dtype, role="arg", index=n, name=f"a{n}"))

    def constant(self, var: Any, data: Any) -> Tensor:
        """The tensor of a captured array."""
        try:
            return self.b.constant(data)
        except UnsupportedError as e:
            self.gaps[Gap("captured array", e.reason, short(var.aval))] = None
            return UNTYPED

    def inline(self, jaxpr: Any, operands: Sequence[Tensor], live: Sequence[bool], where: str = "") -> list[Tensor]:
        """Lowers the equations of a jaxpr (closed, or a pair of jaxpr and consts) whose results at `live` are used.

        A result that is not live may be a tensor that stands for nothing. `where` overrides the equations' own lines.
        """
        jaxpr, consts = jaxpr if isinstance(jaxpr, tuple) else _compat.open_jaxpr(jaxpr)
        b, outer = self.b, self.b.eqn
        env: dict[Any, Tensor] = dict(zip(jaxpr.invars, operands, strict=True))
        wanted = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and not _compat.is_literal(v)}
        todo = []
        for eqn in reversed(jaxpr.eqns):
            used = tuple(v in wanted for v in eqn.outvars)
            if eqn.effects or any(used):
                todo.append((eqn, used))
                wanted.update(v for v in eqn.invars if not _compat.is_literal(v))
        env.update((v, self.constant(v, c)) for v, c in zip(jaxpr.constvars, consts, strict=True) if v in wanted)
        for eqn, used in reversed(todo):
            env.update(zip(eqn.outvars, self.equation(eqn, env, used, where), strict=True))
        b.eqn = outer
        return [self.read(env, v) if on else DEAD for v, on in zip(jaxpr.outvars, live, strict=True)]

    def equation(self, eqn: Any, env: dict[Any, Tensor], live: tuple[bool, ...], where: str) -> Sequence[Tensor]:
        """Applies the rule of one equation, or notes why that cannot be."""
        b = self.b
        b.eqn = current = Equation(eqn, Source(eqn.primitive.name, where or _compat.user_where(eqn)), live, where)
        try:
            if any(env.get(v) is UNTYPED for v in eqn.invars if not _compat.is_literal(v)):
                self.rule(current)
            else:
                return self.apply(current, env)
        except UnsupportedError as e:
            self.gaps.update(dict.fromkeys(e.gaps))
        except Exception:
            if not self.gaps:  # with gaps, operands may be stand-ins that no rule has to understand
                raise
        return [self.stand_in(v) if on else DEAD for v, on in zip(eqn.outvars, live, strict=True)]

    def stand_in(self, var: Any) -> Tensor:
        """Something of the type of `var`, if there is such a type."""
        try:
            shape, dtype = self.type_of(var)
        except UnsupportedError:
            return UNTYPED
        return Tensor(shape, dtype, self.b.value(shape, dtype, role="arg"))

    def rule(self, eqn: Equation) -> Rule:
        """The rule of an equation."""
        if eqn.raw.effects:
            self.b.unsupported(f"it has side effects ({', '.join(sorted(str(e) for e in eqn.raw.effects))})")
        if eqn.primitive not in RULES:
            self.b.unsupported("there is no rule for this primitive")
        return RULES[eqn.primitive]

    def apply(self, eqn: Equation, env: dict[Any, Tensor]) -> Sequence[Tensor]:
        """The results of an equation, by its rule."""
        b, raw, live, rule = self.b, eqn.raw, eqn.live, self.rule(eqn)
        operands = [self.read(env, v) for v in raw.invars]
        try:
            eqn.outs = outs = tuple(
                self.type_of(v) if on else _NO_TYPE for v, on in zip(raw.outvars, live, strict=True)
            )
        except UnsupportedError:
            known = len(self.gaps)
            if _compat.subjaxprs(raw):
                rule(b, eqn, *operands)
            if len(self.gaps) == known:
                raise
            return [self.stand_in(v) for v in raw.outvars]  # an equation inside said it better
        if all(0 in shape for (shape, _), on in zip(outs, live, strict=True) if on):
            return [Tensor(shape, dtype, splat=DEAD.splat) for shape, dtype in outs]
        if eqn.primitive not in EMPTY and any(0 in getattr(v.aval, "shape", ()) for v in raw.invars):
            b.unsupported("an operand has no elements")
        if eqn.primitive in MOVES and any(_is_key(v) for v in raw.invars):
            results = self.wordwise(rule, eqn, operands)
        else:
            results = _list(rule(b, eqn, *operands))
        for t, out, on in zip(results, outs, live, strict=True):
            assert not on or (t.shape, t.dtype) == out, f"{eqn.primitive} gives {t.dtype}{t.shape}, not {out}"
        return results

    def wordwise(self, rule: Rule, eqn: Equation, operands: Sequence[Tensor]) -> list[Tensor]:
        """A rule for elements, applied to each word of the keys among the operands."""
        keys = [_is_key(v) for v in eqn.raw.invars]
        outs = tuple((shape[:-1], dtype) if shape else (shape, dtype) for shape, dtype in eqn.outs)
        words = []
        for w in range(KEY_WORDS):
            xs = [pick(self.b, t, len(t.shape) - 1, w) if key else t for t, key in zip(operands, keys, strict=True)]
            words.append(_list(rule(self.b, replace(eqn, outs=outs), *xs)))
        return [stacked(self.b, ts, len(ts[0].shape)) for ts in zip(*words, strict=True)]

    def read(self, env: dict[Any, Tensor], atom: Any) -> Tensor:
        """The tensor of a variable or literal."""
        if not _compat.is_literal(atom):
            return env[atom]
        shape, dtype = self.type_of(atom)
        data = np.asarray(atom.val, atom.aval.dtype)
        if shape:
            return self.b.constant(data)
        return Tensor((), dtype, splat=E.const(data.item(), compute_dtype(dtype)))


def _list(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _is_key(atom: Any) -> bool:
    return _compat.key_width(getattr(atom.aval, "dtype", None)) is not None


def _live(g: Graph) -> Graph:
    """Without the operators that serve no result."""
    wanted = set(g.results)
    ops = []
    for op in reversed(g.ops):
        if not wanted.isdisjoint(op.writes()):
            ops.append(op)
            wanted |= op.reads()
    return g.with_ops(ops[::-1])
