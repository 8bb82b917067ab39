"""From a function to one call of the primitive: what is computed inside, and what is only passed around it.

`jax.make_jaxpr` traces (and remembers its traces: same function, same types, same jaxpr object). `prepare` then turns
the closed jaxpr into a `Call`: arrays that the function closes over become operands, inputs that nothing uses are left
out, and outputs that are inputs, captured arrays, literals or repetitions never enter the primitive. Nor do arrays without
elements: as operands they are constants, as outputs literals.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jc
import numpy as np

EMBED = 1 << 16
"""Bytes up to which a captured NumPy array is a constant of the program; larger ones, and JAX arrays, are operands."""

_INLINE = ("jit", "pjit")


@dataclass(frozen=True)
class Call:
    """One call. `operands` and `outputs` say where values come from:

    ("arg", i) flat argument i; ("captured", i) entry i of `captured(closed)`; ("result", i) result i of the primitive;
    ("literal", v) the value v. `jaxpr` is None when there is nothing to compute.
    """

    jaxpr: jc.ClosedJaxpr | None
    operands: tuple[tuple[str, Any], ...]
    outputs: tuple[tuple[str, Any], ...]
    nested: tuple[Any, ...]

    def captured(self, closed: jc.ClosedJaxpr) -> Sequence[Any]:
        """The arrays that the function closes over (tracers of an enclosing trace included)."""
        return [*closed.consts, *self.nested]


_calls: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()


def prepare(closed: jc.ClosedJaxpr) -> Call:
    """The `Call` of a traced function; the same object for the same jaxpr."""
    call = _calls.get(closed)
    if call is None:
        call = _calls[closed] = _prepare(closed)
    return call


def _prepare(closed: jc.ClosedJaxpr) -> Call:
    jaxpr = closed.jaxpr
    eqns, outvars = list(jaxpr.eqns), list(jaxpr.outvars)
    constvars, consts, nested = list(jaxpr.constvars), list(closed.consts), []
    if any(_has_captures(e) for e in eqns):
        known = {id(c): (v, c) for v, c in zip(constvars, consts, strict=True)}
        binds = dict(known)
        alias: dict[Any, Any] = {}
        eqns = _inlined(eqns, alias, binds)
        outvars = [_atom(v, alias) for v in outvars]
        fresh = [x for key, x in binds.items() if key not in known]
        constvars += [v for v, _ in fresh]
        nested = [c for _, c in fresh]
        consts += nested

    used = {v for e in eqns for v in e.invars if not isinstance(v, jc.Literal)}
    origin: dict[Any, tuple[str, Any]] = {v: ("arg", i) for i, v in enumerate(jaxpr.invars)}
    origin |= {v: ("captured", i) for i, v in enumerate(constvars)}
    kept = [(v, c) for v, c in zip(constvars, consts, strict=True) if v in used and _embeds(c)]
    empty = [v for v in (*constvars, *jaxpr.invars) if v in used and _is_empty(v)]
    kept = list((dict(kept) | {v: np.zeros(v.aval.shape, v.aval.dtype) for v in empty}).items())
    embedded = {v for v, _ in kept}
    invars = [v for v in (*constvars, *jaxpr.invars) if v in used and v not in embedded]

    results: dict[Any, int] = {}
    outputs: list[tuple[str, Any]] = []
    for v in outvars:
        if isinstance(v, jc.Literal):
            outputs.append(("literal", np.asarray(v.val, v.aval.dtype)))
        elif v in origin:
            outputs.append(origin[v])
        elif _is_empty(v):
            outputs.append(("literal", np.zeros(v.aval.shape, v.aval.dtype)))
        else:
            outputs.append(("result", results.setdefault(v, len(results))))
    inner = None
    if results:
        open_ = jaxpr.replace(constvars=[v for v, _ in kept], invars=invars, outvars=list(results), eqns=eqns)
        inner = jc.ClosedJaxpr(open_, [c for _, c in kept])
    return Call(inner, tuple(origin[v] for v in invars), tuple(outputs), tuple(nested))


def _embeds(const: Any) -> bool:
    return not isinstance(const, jax.Array) and np.asarray(const).nbytes <= EMBED


def _is_empty(v: Any) -> bool:
    """Whether a variable is an array of numbers without elements."""
    return 0 in getattr(v.aval, "shape", ()) and isinstance(v.aval.dtype, np.dtype)


def _has_captures(eqn: Any) -> bool:
    if eqn.primitive.name not in _INLINE:
        return False
    inner = eqn.params["jaxpr"]
    return any(not _embeds(c) for c in inner.consts) or any(map(_has_captures, inner.jaxpr.eqns))


def _atom(v: Any, alias: dict[Any, Any]) -> Any:
    return v if isinstance(v, jc.Literal) else alias.get(v, v)


def _inlined(eqns: Iterable[Any], alias: dict[Any, Any], binds: dict[int, tuple[Any, Any]]) -> list[Any]:
    """`eqns` with each `jit` that captures arrays replaced by its body, on fresh variables.

    `alias` gets what the results of replaced equations are called now; `binds` gets, by identity of the captured
    array, its variable and itself.
    """
    out = []
    for eqn in eqns:
        eqn = eqn.replace(invars=[_atom(v, alias) for v in eqn.invars])
        if not _has_captures(eqn):
            out.append(eqn)
            continue
        closed = eqn.params["jaxpr"]
        body = closed.jaxpr
        inner: dict[Any, Any] = dict(zip(body.invars, eqn.invars, strict=True))
        for v, c in zip(body.constvars, closed.consts, strict=True):
            inner[v] = binds.setdefault(id(c), (jc.Var(v.aval), c))[0]
        renamed = []
        for e in _inlined(body.eqns, inner, binds):
            for v in e.outvars:
                if type(v) is jc.Var:
                    inner[v] = jc.Var(v.aval)
            renamed.append((e, [inner.get(v, v) for v in e.outvars]))
        out += [e.replace(invars=[_atom(v, inner) for v in e.invars], outvars=o) for e, o in renamed]
        alias.update({v: _atom(a, inner) for v, a in zip(eqn.outvars, body.outvars, strict=True)})
    return out


def side_effects(closed: jc.ClosedJaxpr) -> list[Any]:
    """The equations with effects that a pure call cannot have: prints, callbacks, references."""
    return [e for e in closed.eqns if any(type(x).__name__ != "NamedAxisEffect" for x in e.effects)]
