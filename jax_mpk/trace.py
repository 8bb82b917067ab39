"""From a function to one call of the primitive: what is computed inside, and what is only passed around it.

`jax.make_jaxpr` traces (and remembers its traces: same function, same types, same jaxpr object). `prepare` then turns
the closed jaxpr into a `Call`: arrays that the function closes over become operands, inputs that nothing uses are left
out, and outputs that are inputs, captured arrays, literals or repetitions never enter the primitive. Nor do arrays without
elements: as operands they are constants, as outputs literals.

What is made of a call later (its evaluation outside of `jit`, its derivative, its batched forms) is kept in the call
(`remembered`), the call by the closed jaxpr, and that by JAX for as long as the traced function lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.extend.core as jc
import numpy as np

from jax_mpk import _compat

T = TypeVar("T")
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
    derived: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def captured(self, closed: jc.ClosedJaxpr) -> Sequence[Any]:
        """The arrays that the function closes over (tracers of an enclosing trace included)."""
        return [*closed.consts, *self.nested]


_calls: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
_owners: weakref.WeakKeyDictionary[Any, weakref.ref[Call]] = weakref.WeakKeyDictionary()
"""The call of a jaxpr inside. By weak reference: what a call keeps may hold its jaxpr."""


def prepare(closed: jc.ClosedJaxpr, arguments: Callable[[], Sequence[str]] | None = None) -> Call:
    """The `Call` of a traced function; the same object for the same jaxpr. `arguments`: names of the flat arguments, for
    messages; by default the operands are numbered."""
    call = _calls.get(closed)
    if call is None:
        call = _calls[closed] = _prepare(closed, arguments)
        if call.jaxpr is not None:
            _owners[call.jaxpr] = weakref.ref(call)
    return call


def remembered(jaxpr: jc.ClosedJaxpr, key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, once for the call of `jaxpr` and `key`; each time for a jaxpr whose call is gone. The result may hold the
    jaxpr: nothing but its call holds the result."""
    ref = _owners.get(jaxpr)
    call = ref() if ref is not None else None
    if call is None:
        return make()
    if key not in call.derived:
        call.derived[key] = make()
    made: T = call.derived[key]
    return made


def _prepare(closed: jc.ClosedJaxpr, arguments: Callable[[], Sequence[str]] | None) -> Call:
    whole = _without(closed, _has_captures)
    jaxpr, consts, nested = whole.jaxpr, list(whole.consts), whole.consts[len(closed.consts) :]
    eqns, constvars = jaxpr.eqns, jaxpr.constvars
    outvars: list[Any] = list(jaxpr.outvars)

    used = {v for e in eqns for v in e.invars if not isinstance(v, jc.Literal)}
    origin: dict[Any, tuple[str, Any]] = {v: ("arg", i) for i, v in enumerate(jaxpr.invars)}
    origin |= {v: ("captured", i) for i, v in enumerate(constvars)}
    kept = [(v, c) for v, c in zip(constvars, consts, strict=True) if v in used and _embeds(c)]
    empty: list[Any] = [v for v in (*constvars, *jaxpr.invars) if v in used and _is_empty(v)]
    kept = list((dict(kept) | {v: np.zeros(v.aval.shape, v.aval.dtype) for v in empty}).items())
    embedded = {v for v, _ in kept}
    invars = [v for v in (*constvars, *jaxpr.invars) if v in used and v not in embedded]

    results: dict[Any, int] = {}
    outputs: list[tuple[str, Any]] = []
    for v in outvars:
        if isinstance(v, jc.Literal):
            aval: Any = v.aval
            outputs.append(("literal", np.asarray(v.val, aval.dtype)))
        elif v in origin:
            outputs.append(origin[v])
        elif _is_empty(v):
            outputs.append(("literal", np.zeros(v.aval.shape, v.aval.dtype)))
        else:
            outputs.append(("result", results.setdefault(v, len(results))))
    inner = None
    if results:
        names = arguments() if arguments is not None else ()
        pairs = zip(outvars, _compat.result_names(jaxpr), strict=True)
        called = {v: n for v, n in pairs if not isinstance(v, jc.Literal)}
        debug_info = _compat.renamed(
            jaxpr.debug_info, [_name(*origin[v], names) for v in invars], [called[v] for v in results]
        )
        open_ = jaxpr.replace(constvars=[v for v, _ in kept], invars=invars, outvars=list(results), eqns=eqns,
                              debug_info=debug_info)  # fmt: skip
        inner = jc.ClosedJaxpr(open_, [c for _, c in kept])
    return Call(inner, tuple(origin[v] for v in invars), tuple(outputs), tuple(nested))


def _name(kind: str, n: int, arguments: Sequence[str]) -> str:
    if kind == "captured":
        return "a captured array"
    return arguments[n] if n < len(arguments) else f"operand {n}"


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
    """What `v` is called in the end: the result of a call inside a call has had several names."""
    while not isinstance(v, jc.Literal) and v in alias:
        v = alias[v]
    return v


def flat(closed: jc.ClosedJaxpr) -> jc.ClosedJaxpr:
    """The same function without calls: the equations inside them in their places. Loops and branches stay."""
    return _without(closed, _is_call)


def _without(closed: jc.ClosedJaxpr, which: Callable[[Any], bool]) -> jc.ClosedJaxpr:
    """The same function without the calls of `which`; what they capture comes after its own constants."""
    jaxpr = closed.jaxpr
    if not any(map(which, jaxpr.eqns)):
        return closed
    known = {id(c): (v, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    alias: dict[Any, Any] = {}
    binds = dict(known)
    eqns = _inlined(jaxpr.eqns, alias, binds, which)
    outvars = [_atom(v, alias) for v in jaxpr.outvars]
    fresh = [x for key, x in binds.items() if key not in known]
    open_ = jaxpr.replace(constvars=[*jaxpr.constvars, *(v for v, _ in fresh)], eqns=eqns, outvars=outvars)
    return jc.ClosedJaxpr(open_, [*closed.consts, *(c for _, c in fresh)])


def _is_call(eqn: Any) -> bool:
    return eqn.primitive.name in _compat.CALLS and not _compat.places(eqn) and _compat.called(eqn) is not None


def _inlined(eqns: Iterable[Any], alias: dict[Any, Any], binds: dict[int, tuple[Any, Any]],
             which: Callable[[Any], bool]) -> list[Any]:  # fmt: skip
    """`eqns` with each call of `which` replaced by its body, on fresh variables.

    `alias` gets what the results of replaced equations are called now; `binds` gets, by identity of the captured
    array, its variable and itself.
    """
    out = []
    for eqn in eqns:
        eqn = eqn.replace(invars=[_atom(v, alias) for v in eqn.invars])
        if not which(eqn):
            out.append(eqn)
            continue
        body, consts = _compat.open_jaxpr(_compat.called(eqn))
        inner: dict[Any, Any] = dict(zip(body.invars, eqn.invars, strict=True))
        for v, c in zip(body.constvars, consts, strict=True):
            inner[v] = binds.setdefault(id(c), (jc.Var(v.aval), c))[0]
        renamed = []
        for e in _inlined(body.eqns, inner, binds, which):
            for v in e.outvars:
                if type(v) is jc.Var:
                    inner[v] = jc.Var(v.aval)
            renamed.append((e, [inner.get(v, v) for v in e.outvars]))
        out += [e.replace(invars=[_atom(v, inner) for v in e.invars], outvars=o) for e, o in renamed]
        alias.update({v: _atom(a, inner) for v, a in zip(eqn.outvars, body.outvars, strict=True)})
    return out


@jax.tree_util.register_static
@dataclass(frozen=True)
class Fact:
    """A value in a pytree that is known when a function is traced. JAX may keep it longer than the function."""

    value: Any


def side_effects(jaxpr: Any) -> list[Any]:
    """The equations with effects that a pure call cannot have: prints, callbacks, references. Those of a call that has
    some, rather than the call."""
    out = []
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        if any(type(x).__name__ != "NamedAxisEffect" for x in eqn.effects):
            inner = [e for j in _compat.subjaxprs(eqn) for e in side_effects(j)]
            out += inner or [eqn]
    return out


def forwarded(closed: jc.ClosedJaxpr) -> list[int]:
    """For every output the number of the flat argument that it is, or -1."""
    number = {v: i for i, v in enumerate(closed.jaxpr.invars)}
    return [-1 if isinstance(v, jc.Literal) else number.get(v, -1) for v in closed.jaxpr.outvars]


def dependent(jaxpr: Any, on: Sequence[bool]) -> list[bool]:
    """Which results of a jaxpr depend on the arguments at `on`."""
    jaxpr = _compat.open_jaxpr(jaxpr)[0]
    known = {v for v, o in zip(jaxpr.invars, on, strict=True) if o}
    for eqn in jaxpr.eqns:
        ins = [not isinstance(v, jc.Literal) and v in known for v in eqn.invars]
        outs = [any(ins)] * len(eqn.outvars)
        if eqn.primitive.name in _INLINE and any(ins):
            outs = dependent(eqn.params["jaxpr"], ins)
        known.update(v for v, o in zip(eqn.outvars, outs, strict=True) if o)
    return [not isinstance(v, jc.Literal) and v in known for v in jaxpr.outvars]
