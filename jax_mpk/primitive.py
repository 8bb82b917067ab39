"""The one primitive, `megakernel`, and its rules.

Parameters: `jaxpr` (closed; its operands are the primitive's), `implementation`, `options`, `name`. Every rule but the
lowering is the rule of the jaxpr itself: differentiation and transposition evaluate it (so they hand it to XLA),
batching makes a new megakernel of the batched function. The lowering compiles, or says why not.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir, xla

from jax_mpk import _compat, backends
from jax_mpk.errors import MegakernelWarning, UnsupportedError
from jax_mpk.options import Options
from jax_mpk.trace import prepare, side_effects

IMPLEMENTATIONS = (None, "cuda", "cpu", "xla")

megakernel_p = jc.Primitive("megakernel")
megakernel_p.multiple_results = True


def call(
    closed: jc.ClosedJaxpr, leaves: Sequence[Any], *, implementation: str | None, options: Options, name: str
) -> list[Any]:
    """The flat outputs of a traced function on flat arguments; binds the primitive at most once.

    A function with side effects is no megakernel: a named implementation raises `UnsupportedError`, None warns.
    """
    effects = side_effects(closed)
    if effects:
        if implementation != "xla":
            eqn = effects[0]
            error = UnsupportedError(eqn.primitive.name, f"{name} has a side effect, which a megakernel cannot",
                                     ", ".join(str(v.aval) for v in eqn.invars), _compat.user_where(eqn))  # fmt: skip
            if implementation is not None:
                raise error
            _warn_once(name, error)
        return jc.jaxpr_as_fun(closed)(*leaves)
    plan = prepare(closed)
    values: dict[str, Sequence[Any]] = {"arg": leaves, "captured": plan.captured(closed)}
    if plan.jaxpr is not None:
        operands = [values[kind][i] for kind, i in plan.operands]
        values["result"] = megakernel_p.bind(
            *operands, jaxpr=plan.jaxpr, implementation=implementation, options=options, name=name
        )
    out = [i if kind == "literal" else values[kind][i] for kind, i in plan.outputs]
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in out]


def reference(*args: Any, jaxpr: jc.ClosedJaxpr, **_: Any) -> list[Any]:
    """What the primitive means: its jaxpr, evaluated equation by equation."""
    return jc.jaxpr_as_fun(jaxpr)(*args)


def _restricted(args: Sequence[Any], live: Sequence[int], jaxpr: jc.ClosedJaxpr) -> Any:
    """The reference as a function of the arguments at `live` only."""

    def fun(*xs: Any) -> list[Any]:
        full = list(args)
        for i, x in zip(live, xs, strict=True):
            full[i] = x
        return reference(*full, jaxpr=jaxpr)

    return fun


# ------------------------------------------------------------------------------------------------ evaluation, types, ad


megakernel_p.def_impl(functools.partial(xla.apply_primitive, megakernel_p))
megakernel_p.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (list(jaxpr.out_avals), jaxpr.effects))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: jc.ClosedJaxpr, **_: Any) -> tuple[Any, Any]:
    live = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    fun = _restricted(primals, live, jaxpr)
    out, dout = jax.jvp(fun, [primals[i] for i in live], [tangents[i] for i in live])
    zero = jax.dtypes.float0
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, [z if t.dtype == zero else t for z, t in zip(zeros, dout, strict=True)]


def _transpose(cts: Sequence[Any], *args: Any, jaxpr: jc.ClosedJaxpr, **_: Any) -> list[Any]:
    live = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]
    fun = _restricted(args, live, jaxpr)
    back = jax.linear_transpose(fun, *(args[i].aval for i in live))([ad.instantiate_zeros(c) for c in cts])
    out: list[Any] = [None] * len(args)
    for i, b in zip(live, back, strict=True):
        out[i] = b
    return out


def _batch(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, jaxpr: jc.ClosedJaxpr, **params: Any) -> Any:
    def fun(_mapped: Any, *xs: Any) -> list[Any]:  # `vmap` wants at least one mapped argument; nobody reads this one
        return reference(*xs, jaxpr=jaxpr)

    batched = jax.vmap(fun, (0, *dims), 0, axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name)
    leaves = [np.zeros(axis.size, np.float32), *args]
    out = call(jax.make_jaxpr(batched)(*leaves), leaves, **params)
    return out, [0] * len(out)


ad.primitive_jvps[megakernel_p] = _jvp
ad.primitive_transposes[megakernel_p] = _transpose
batching.fancy_primitive_batchers[megakernel_p] = _batch

# ------------------------------------------------------------------------------------------------------------- lowering

_to_xla = mlir.lower_fun(reference, multiple_results=True)
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


def _warn_once(name: str, error: Exception) -> None:
    key = (name, str(error))
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    if isinstance(error, UnsupportedError):
        text = f"megakernelize({name}) hands the function to XLA: {error}"
    else:
        text = (f"megakernelize({name}) hands the function to XLA because of a bug in jax_mpk; please report it: "
                f"{type(error).__name__}: {error}")  # fmt: skip
    warnings.warn(text, MegakernelWarning, stacklevel=3)


def _lower(platform: str | None, ctx: Any, *operands: Any, jaxpr: Any, implementation: str | None, options: Options,
           name: str) -> Sequence[Any]:  # fmt: skip
    """Lowers for `platform` (None: one without a backend). A named implementation raises what None only warns about."""
    if implementation != "xla":
        try:
            if platform is None or implementation not in (None, platform):
                raise UnsupportedError("megakernel", f"{name} is lowered for {'/'.join(_platforms(ctx))}, which the "
                                       f"implementation {implementation or 'for it'!r} does not serve")  # fmt: skip
            return backends.get(platform).lower(ctx, operands, jaxpr, options, name)
        except Exception as error:
            if implementation is not None:
                raise
            _warn_once(name, error)
    return _to_xla(ctx, *operands, jaxpr=jaxpr)


def _platforms(ctx: Any) -> Sequence[str]:
    return ctx.platforms or ctx.module_context.platforms


mlir.register_lowering(megakernel_p, functools.partial(_lower, None))
for _name in backends.NAMES:
    mlir.register_lowering(megakernel_p, functools.partial(_lower, _name), platform=_name)
