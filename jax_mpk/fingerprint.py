"""A content hash of a jaxpr that is the same in every process: the key under which compiled programs are kept.

Everything that decides the result is hashed: primitives, parameters, types, literals, constants, and how variables
connect. Source lines and the derivative rules of custom_jvp/custom_vjp are not. A parameter that cannot be written
down (its text is a memory address, or it is a function that no module has under its name) makes the whole jaxpr
`Unhashable`. Such a function has no key: its program carries zeros, no cache keeps or finds it, and executors tell it
from others by its content.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jc
import numpy as np

from jax_mpk import _compat

_ONLY_BODY = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "closed_call", "eval_jaxpr"}
"""Wrappers whose meaning is their body: shardings, names, policies and derivatives do not change the value."""


class Unhashable(Exception):
    """A parameter has no stable text."""


def fingerprint(closed: jc.ClosedJaxpr, *context: Any) -> bytes:
    """32 bytes for the jaxpr, its constants and `context` (plain values). Raises `Unhashable`."""
    h = hashlib.sha256()
    _value(h, context)
    _jaxpr(h, closed)
    return h.digest()


@functools.cache
def package_digest() -> str:
    """A hash of this package's Python sources: an edited compiler never takes its predecessor's programs."""
    root = Path(__file__).parent
    h = hashlib.sha256()
    for p in sorted(root.rglob("*.py")):
        h.update(str(p.relative_to(root)).encode() + b"\0" + p.read_bytes() + b"\0")
    return h.hexdigest()


def _put(h: Any, text: str) -> None:
    data = text.encode()
    h.update(len(data).to_bytes(8, "little") + data)


def _aval(h: Any, aval: Any) -> None:
    _put(h, f"{aval.dtype}{aval.shape}{getattr(aval, 'weak_type', False)}")


def _jaxpr(h: Any, j: Any) -> None:
    jaxpr = j.jaxpr if hasattr(j, "jaxpr") else j
    number: dict[Any, int] = {}

    def define(v: Any) -> None:
        number[v] = len(number)
        _aval(h, v.aval)

    def atom(v: Any) -> None:
        if isinstance(v, jc.Literal):
            _value(h, np.asarray(v.val))
            _aval(h, v.aval)
        else:
            h.update(number[v].to_bytes(8, "little"))

    _put(h, f"jaxpr {len(jaxpr.constvars)} {len(jaxpr.invars)} {len(jaxpr.eqns)} {len(jaxpr.outvars)}")
    for v in (*jaxpr.constvars, *jaxpr.invars):
        define(v)
    for c in getattr(j, "consts", ()):
        _value(h, c)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        _put(h, f"{name} {len(eqn.invars)} {len(eqn.outvars)}")
        for v in eqn.invars:
            atom(v)
        for key, p in sorted(eqn.params.items()):
            if name not in _ONLY_BODY or _is_jaxpr(p):
                _put(h, key)
                _value(h, p)
        for place in _compat.places(eqn) if name in _ONLY_BODY else ():
            _put(h, f"at {place}")  # what is refused must not find the program of what is not
        for v in eqn.outvars:
            define(v)
    for v in jaxpr.outvars:
        atom(v)


def _is_jaxpr(p: Any) -> bool:
    return hasattr(p, "eqns")


def _importable(p: Any) -> bool:
    """True when module and name lead to `p` itself: closures and lambdas share their names with others."""
    found: Any = sys.modules.get(p.__module__ or "")
    for part in p.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is p


def _value(h: Any, p: Any) -> None:
    if p is None or isinstance(p, bool | int | float | complex | str | bytes | np.dtype | np.generic):
        _put(h, f"{type(p).__name__} {p!r}")
    elif isinstance(p, np.ndarray | jax.Array):
        if jax.dtypes.issubdtype(p.dtype, jax.dtypes.prng_key):
            _put(h, str(p.dtype))
            p = jax.random.key_data(p)
        a = np.ascontiguousarray(p)
        _put(h, f"array {a.dtype}{np.shape(p)}")
        h.update(a.tobytes())
    elif _is_jaxpr(p):
        _jaxpr(h, p)
    elif isinstance(p, enum.Enum):
        _put(h, f"{type(p).__qualname__}.{p.name}")
    elif isinstance(p, tuple | list):
        _put(h, f"{type(p).__qualname__} {len(p)}")
        for x in p:
            _value(h, x)
    elif isinstance(p, dict):
        _put(h, f"dict {len(p)}")
        for k in sorted(p, key=repr):
            _value(h, k)
            _value(h, p[k])
    elif isinstance(p, frozenset | set):
        _value(h, sorted(p, key=repr))
    elif dataclasses.is_dataclass(p) and not isinstance(p, type):
        _put(h, type(p).__qualname__)
        for f in dataclasses.fields(p):
            _value(h, getattr(p, f.name))
    elif callable(p) and hasattr(p, "__qualname__"):
        if not _importable(p):
            raise Unhashable(f"{p!r} is not what {p.__module__} calls {p.__qualname__}")
        _put(h, f"{p.__module__}.{p.__qualname__}")
    else:
        text = f"{type(p).__qualname__} {p!r}"
        if " at 0x" in text:
            raise Unhashable(text)
        _put(h, text)
