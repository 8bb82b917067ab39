"""A jaxpr in float64: the reference that float results are judged by.

With `rounds`, every result that the jaxpr types as a narrower float is rounded to that type, as a program does that keeps
each rounding that the function asks for; without, nothing is. Both are right; their distance is the noise of the types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk import _compat


class NoReference(Exception):
    """The jaxpr has an equation that is not evaluated here."""


def evaluate(closed: Any, args: Sequence[np.ndarray], rounds: bool) -> list[np.ndarray]:
    """The results of a closed jaxpr, floats as float64. Raises `NoReference`."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = [_widen(a) for a in args]
        out = jax.jit(lambda *xs: _jaxpr(closed, xs, rounds))(*wide)
        return [np.asarray(x) for x in out]


def _real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _widen(x: Any) -> Any:
    return jnp.asarray(x).astype(jnp.float64) if _real(x.dtype) else jnp.asarray(x)


def _jaxpr(closed: Any, args: Sequence[Any], rounds: bool) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(closed)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(_widen, consts), *args), strict=True))

    def read(a: Any) -> Any:
        return _widen(np.asarray(a.val, a.aval.dtype)) if _compat.is_literal(a) else env[a]

    for eqn in jaxpr.eqns:
        out = _equation(eqn, [read(a) for a in eqn.invars], rounds)
        for v, x in zip(eqn.outvars, out, strict=True):
            if rounds and _real(v.aval.dtype) and v.aval.dtype != jnp.float64:
                info = jnp.finfo(v.aval.dtype)
                x = lax.reduce_precision(x, info.nexp, info.nmant)
            env[v] = x
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, xs: list[Any], rounds: bool) -> list[Any]:
    name, params = eqn.primitive.name, dict(eqn.params)
    inner = next(
        (params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params and hasattr(params[k], "eqns")), None
    )
    if name == "scan":
        return _scan(params, xs, rounds)
    if name == "cond":
        cases = [_jaxpr(b, xs[1:], rounds) for b in params["branches"]]
        at = jnp.clip(xs[0].astype(jnp.int32), 0, len(cases) - 1)
        return [lax.select_n(at, *c) if len(c) > 1 else c[0] for c in zip(*cases, strict=True)]
    if name in ("reduce", "reduce_window"):
        return _reduced(name, params, xs)
    if inner is not None:
        return _jaxpr(inner, xs, rounds)
    if name in ("while", "custom_vjp_call", "custom_jvp_call", "random_bits"):
        if name != "random_bits":
            raise NoReference(name)
    if name == "bitcast_convert_type":
        old, new = eqn.invars[0].aval.dtype, params["new_dtype"]
        x = xs[0].astype(old) if _real(old) else xs[0]
        return [_widen(lax.bitcast_convert_type(x, new))]
    if name == "reduce_precision":
        return [lax.reduce_precision(xs[0], params["exponent_bits"], params["mantissa_bits"]) if rounds else xs[0]]
    if name.startswith("scatter"):
        how = name.replace("-", "_")
        if how == "scatter" and params.get("update_jaxpr") is not None:
            raise NoReference("a scatter with a function")
        return [getattr(lax, how)(*xs, params["dimension_numbers"], indices_are_sorted=params["indices_are_sorted"],
                                  unique_indices=params["unique_indices"], mode=params["mode"])]  # fmt: skip
    if name == "select_and_gather_add":  # JAX's own would round: it packs two numbers into one
        return [_tangents(*xs, **params)]
    if name == "nextafter":
        own = eqn.outvars[0].aval.dtype
        return [_widen(lax.nextafter(*(x.astype(own) for x in xs)))]
    for key in ("new_dtype", "preferred_element_type", "dtype", "accumulation_type", "out_dtype"):
        if params.get(key) is not None and _real(params[key]):
            params[key] = np.dtype(np.float64)
    if name == "convert_element_type" and not _real(params["new_dtype"]) and _real(eqn.invars[0].aval.dtype):
        xs = [xs[0].astype(eqn.invars[0].aval.dtype)]  # the value that is converted has its own type
    out = eqn.primitive.bind(*xs, **params)
    out = list(out) if eqn.primitive.multiple_results else [out]
    return [_widen(x) if _real(getattr(x, "dtype", np.int32)) else x for x in out]


def _reduced(name: str, params: dict[str, Any], xs: list[Any]) -> list[Any]:
    """A reduction by the jaxpr of a function of scalars."""
    n, jaxpr = len(xs) // 2, params["jaxpr"]
    if params.get("consts"):
        raise NoReference("a function that captures arrays")

    def f(a: Any, b: Any) -> Any:
        return tuple(_jaxpr(jaxpr, [*a, *b], False))

    xs, init = tuple(xs[:n]), tuple(xs[n:])
    if name == "reduce":
        return list(lax.reduce(xs, init, f, params["dimensions"]))
    keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    return list(lax.reduce_window(xs, init, f, *(params[k] for k in keys)))


def _tangents(t: Any, x: Any, *, select_prim: Any, window_dimensions: Any, window_strides: Any, padding: Any,
              base_dilation: Any, window_dilation: Any) -> Any:  # fmt: skip
    def step(a: Any, b: Any) -> Any:
        keep = select_prim.bind(a[0], b[0])
        return lax.select(keep, a[0], b[0]), lax.select(keep, a[1], b[1])

    init = np.float64(-np.inf if select_prim.name == "ge" else np.inf)
    return lax.reduce_window((x, t), (init, np.float64(0)), step, window_dimensions, window_strides, padding,
                             base_dilation, window_dilation)[1]  # fmt: skip


def _scan(params: dict[str, Any], xs: list[Any], rounds: bool) -> list[Any]:
    consts, carries = _compat.scan_counts(params)
    if params["length"] > 64:
        raise NoReference("a long scan")
    carry, columns = xs[consts : consts + carries], []
    order = range(params["length"])
    for n in reversed(order) if params["reverse"] else order:
        out = _jaxpr(params["jaxpr"], [*xs[:consts], *carry, *(x[n] for x in xs[consts + carries :])], rounds)
        carry = out[:carries]
        columns.append(out[carries:])
    columns = columns[::-1] if params["reverse"] else columns
    return [*carry, *(jnp.stack(c) for c in zip(*columns, strict=True))]
