"""A jaxpr in float64: the reference that float results are judged by.

Exactly, nothing is rounded. Rounded, every result that the jaxpr types as a narrower float is rounded to that type, as a
program does that keeps each rounding that the function asks for. Both are right; their distance is the noise of the types,
but may be zero by luck. Shaken, every result that a narrower float cannot hold is off by up to a unit in its last place,
and so is every term of a sum: what roundings do to the result, whatever they are (Monte Carlo arithmetic).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk import _compat


class NoReference(Exception):
    """The jaxpr has an equation that is not evaluated here."""


SHAKES = 8
"""Shaken evaluations of a function."""


class Reference:
    """What the results of a function should be, each computed when it is asked for. All but `stepwise` raise `NoReference`.

    `whole`: compiled by XLA as one; else operation by operation, for functions that XLA's compiler does not come back from.
    """

    def __init__(self, f: Callable[..., Any], closed: Any, args: Sequence[np.ndarray], whole: bool = True) -> None:
        self.f, self.closed, self.args, self.compile = f, closed, args, jax.jit if whole else lambda g: g

    @functools.cached_property
    def exactly(self) -> list[np.ndarray]:
        return self._evaluate(lambda key: Arithmetic())

    @functools.cached_property
    def rounded(self) -> list[np.ndarray]:
        return self._evaluate(lambda key: Rounded())

    @functools.cached_property
    def shaken(self) -> list[np.ndarray]:
        """Per result, `SHAKES` of it, stacked."""
        return self._evaluate(Shaken, SHAKES)

    @functools.cached_property
    def stepwise(self) -> list[np.ndarray]:
        """In the function's own types, one operation at a time: what XLA rewrites in larger pieces is as it was written."""
        with jax.disable_jit():
            return [np.asarray(x) for x in jax.tree.leaves(self.f(*map(jnp.asarray, self.args)))]

    def _evaluate(self, how: Callable[[Any], Arithmetic], times: int = 0) -> list[np.ndarray]:
        """The results, floats as float64; `times`: that many of each, stacked."""
        with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
            wide = [_widen(a) for a in self.args]
            f = self.compile(lambda key, *xs: _jaxpr(self.closed, xs, how(key)))
            try:
                out = [[np.asarray(x) for x in f(jax.random.key(n), *wide)] for n in range(times or 1)]
            except jax.errors.JaxRuntimeError as e:  # 100017: YNNPACK does not get windows over a dilated operand right
                raise NoReference(f"XLA fails: {e}") from e
            return [np.stack(x) for x in zip(*out, strict=True)] if times else out[0]


class Arithmetic:
    """What becomes of the results of an evaluation in float64: here nothing."""

    def operands(self, eqn: Any, xs: list[Any]) -> list[Any]:
        """The operands that a second evaluation of `eqn` takes, of which `result` is given both results; itself: none."""
        return xs

    def result(self, eqn: Any, v: Any, x: Any, again: Any) -> Any:
        """The result `v` of `eqn`."""
        return x


class Rounded(Arithmetic):
    def result(self, eqn: Any, v: Any, x: Any, again: Any) -> Any:
        return _narrowed(x, v.aval.dtype)


class Shaken(Arithmetic):
    def __init__(self, key: Any) -> None:
        self.key, self.drawn = key, 0

    def operands(self, eqn: Any, xs: list[Any]) -> list[Any]:
        return [self._off(x, 2.0**-23) if _real(x.dtype) else x for x in xs] if eqn.primitive.name in _SUMS else xs

    def result(self, eqn: Any, v: Any, x: Any, again: Any) -> Any:
        if eqn.primitive.name not in _INEXACT and eqn.primitive.name not in _SUMS:
            return x
        eps = float(jnp.finfo(v.aval.dtype).eps)
        if eqn.primitive.name == "convert_element_type" and eps <= _eps(eqn.invars[0].aval.dtype):
            return x
        return jnp.where(jnp.isfinite(x) & (_narrowed(x, v.aval.dtype) != x), self._off(again, eps), x)

    def _off(self, x: Any, eps: float) -> Any:
        self.drawn += 1
        return x * (1 + eps * jax.random.uniform(jax.random.fold_in(self.key, self.drawn), x.shape, x.dtype, -1, 1))


_SUMS = frozenset("reduce_sum reduce_prod reduce_window_sum cumsum cumprod cumlogsumexp dot_general conv_general_dilated "
                  "scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul reduce reduce_window "
                  "select_and_scatter_add ragged_dot ragged_dot_general".split())  # fmt: skip
_INEXACT = frozenset("add add_any sub mul div rem pow integer_pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p log2 tanh sin cos tan "
                     "asin acos atan atan2 sinh cosh asinh acosh atanh logistic erf erfc erf_inv lgamma digamma "
                     "convert_element_type one_minus_square".split())  # fmt: skip
"""Operations that round. The others hand on what they are given: equal numbers have to stay equal."""


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if _real(dtype) else 0.0


def _narrowed(x: Any, dtype: Any) -> Any:
    """`x` rounded to a narrower float type."""
    if not _real(dtype) or dtype == jnp.float64:
        return x
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def _real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _widen(x: Any) -> Any:
    return jnp.asarray(x).astype(jnp.float64) if _real(x.dtype) else jnp.asarray(x)


def _jaxpr(closed: Any, args: Sequence[Any], how: Arithmetic) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(closed)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(_widen, consts), *args), strict=True))

    def read(a: Any) -> Any:
        return _widen(np.asarray(a.val, a.aval.dtype)) if _compat.is_literal(a) else env[a]

    for eqn in jaxpr.eqns:
        xs = [read(a) for a in eqn.invars]
        moved = how.operands(eqn, xs)
        out = _equation(eqn, xs, how)
        again = out if moved is xs else _equation(eqn, moved, how)
        for v, x, y in zip(eqn.outvars, out, again, strict=True):
            env[v] = how.result(eqn, v, x, y) if _real(v.aval.dtype) else x
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, xs: list[Any], how: Arithmetic) -> list[Any]:
    name, params = eqn.primitive.name, dict(eqn.params)
    if name == "scan":
        return _scan(params, xs, how)
    if name == "cond":
        cases = [_jaxpr(b, xs[1:], how) for b in params["branches"]]
        at = jnp.clip(xs[0].astype(jnp.int32), 0, len(cases) - 1)
        return [lax.select_n(at, *c) if len(c) > 1 else c[0] for c in zip(*cases, strict=True)]
    if name in ("reduce", "reduce_window"):
        return _reduced(name, params, xs)
    if name in _compat.CALLS and hasattr(inner := _compat.called(eqn), "eqns"):
        return _jaxpr(inner, xs, how)
    if name in ("while", "custom_vjp_call", "custom_jvp_call", "random_bits"):
        if name != "random_bits":
            raise NoReference(name)
    if name == "bitcast_convert_type":
        old, new = eqn.invars[0].aval.dtype, params["new_dtype"]
        x = xs[0].astype(old) if _real(old) else xs[0]
        return [_widen(lax.bitcast_convert_type(x, new))]
    if name == "reduce_precision":
        return [
            lax.reduce_precision(xs[0], params["exponent_bits"], params["mantissa_bits"])
            if isinstance(how, Rounded)
            else xs[0]
        ]
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
    if name == "conv_general_dilated":
        return [_convolution(*xs, params)]
    out = eqn.primitive.bind(*xs, **params)
    out = list(out) if eqn.primitive.multiple_results else [out]
    return [_widen(x) if _real(getattr(x, "dtype", np.int32)) else x for x in out]


def _convolution(x: Any, w: Any, params: dict[str, Any]) -> Any:
    """Padding and holes of `x` are zeros that are multiplied (docs/decisions.md 58), and groups are taken one by one: as one, XLA
    writes zeros for the weights between groups, and zero times infinity is no number."""
    dims, features, batches = params["dimension_numbers"], params["feature_group_count"], params["batch_group_count"]
    spatial = params["padding"], params["lhs_dilation"]
    for at, pads, hole in zip(dims.lhs_spec[2:], *spatial, strict=True):
        if x.shape[at]:
            x = lax.pad(x, _zero(x), [(*pads, hole - 1) if d == at else (0, 0, 0) for d in range(x.ndim)])
    flat, ones = ((0, 0),) * len(spatial[0]), (1,) * len(spatial[0])
    params = params | {"padding": flat, "lhs_dilation": ones}
    n = features * batches  # one of them is 1
    one = params | {"feature_group_count": 1, "batch_group_count": 1}
    xs = jnp.split(x, n, dims.lhs_spec[1] if features > 1 else dims.lhs_spec[0])
    ws = jnp.split(w, n, dims.rhs_spec[0])
    return jnp.concatenate(
        [lax.conv_general_dilated_p.bind(a, b, **one) for a, b in zip(xs, ws, strict=True)], dims.out_spec[1]
    )


def _zero(x: Any) -> Any:
    return jnp.zeros((), x.dtype)


def _reduced(name: str, params: dict[str, Any], xs: list[Any]) -> list[Any]:
    """A reduction by the jaxpr of a function of scalars."""
    n, jaxpr = len(xs) // 2, params["jaxpr"]
    if params.get("consts"):
        raise NoReference("a function that captures arrays")

    def f(a: Any, b: Any) -> Any:
        return tuple(_jaxpr(jaxpr, [*a, *b], Arithmetic()))

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


def _scan(params: dict[str, Any], xs: list[Any], how: Arithmetic) -> list[Any]:
    consts, carries = _compat.scan_counts(params)
    if params["length"] > 64:
        raise NoReference("a long scan")
    carry, columns = xs[consts : consts + carries], []
    order = range(params["length"])
    for n in reversed(order) if params["reverse"] else order:
        out = _jaxpr(params["jaxpr"], [*xs[:consts], *carry, *(x[n] for x in xs[consts + carries :])], how)
        carry = out[:carries]
        columns.append(out[carries:])
    if not columns:  # no iteration: arrays without elements
        empty = [jnp.zeros((0, *v.aval.shape), v.aval.dtype) for v in params["jaxpr"].jaxpr.outvars[carries:]]
        return [*carry, *map(_widen, empty)]
    columns = columns[::-1] if params["reverse"] else columns
    return [*carry, *(jnp.stack(c) for c in zip(*columns, strict=True))]
