"""The one primitive, `megakernel`, and its rules.

Parameters: `jaxpr` (closed; its operands are the primitive's), `implementation`, `options`, `name`, and `derived`: it is
the forward pass of a derivative. The derivative of a megakernel is the megakernel of its forward pass, which also gives
what the linear part needs, and the linear part, which is XLA's. Batching makes a megakernel of the batched function. The
lowering compiles, or says why not.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from jax_mpk import _compat, backends, cuts, predict
from jax_mpk.errors import Gap, OptionError, UnsupportedError, plural
from jax_mpk.options import Options
from jax_mpk.trace import Fact, dependent, prepare, remembered, side_effects

IMPLEMENTATIONS = (None, "cuda", "cpu", "xla")

megakernel_p = jc.Primitive("megakernel")
megakernel_p.multiple_results = True


def call(closed: jc.ClosedJaxpr, leaves: Sequence[Any], *, implementation: str | None, options: Options, name: str,
         derived: bool = False, arguments: Callable[[], Sequence[str]] | None = None) -> list[Any]:  # fmt: skip
    """The flat outputs of a traced function on flat arguments (called `arguments()`); binds the primitive at most once.

    A function with side effects is no megakernel: a named implementation raises `UnsupportedError`, None warns.
    """
    effects = side_effects(closed)
    if effects:
        if implementation != "xla":
            error = UnsupportedError.of(
                Gap(e.primitive.name, f"{name} has a side effect, which a megakernel cannot",
                    ", ".join(str(v.aval) for v in e.invars), _compat.user_where(e)) for e in effects
            )  # fmt: skip
            if implementation is not None:
                raise error
            _warn_once(name, error)
        results: list[Any] = jc.jaxpr_as_fun(closed)(*leaves)
        return results
    plan = prepare(closed, arguments)
    values: dict[str, Sequence[Any]] = {"arg": leaves, "captured": plan.captured(closed)}
    if plan.jaxpr is not None:
        operands = [values[kind][i] for kind, i in plan.operands]
        values["result"] = megakernel_p.bind(
            *operands, jaxpr=plan.jaxpr, implementation=implementation, options=options, name=name, derived=derived
        )
    out = [i if kind == "literal" else values[kind][i] for kind, i in plan.outputs]
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in out]


def reference(*args: Any, jaxpr: jc.ClosedJaxpr, **_: Any) -> list[Any]:
    """What the primitive means: its jaxpr, evaluated equation by equation."""
    out: list[Any] = jc.jaxpr_as_fun(jaxpr)(*args)
    return out


def _restricted(args: Sequence[Any], live: Sequence[int], jaxpr: jc.ClosedJaxpr) -> Any:
    """The reference as a function of the arguments at `live` only."""

    def fun(*xs: Any) -> list[Any]:
        full = list(args)
        for i, x in zip(live, xs, strict=True):
            full[i] = x
        return reference(*full, jaxpr=jaxpr)

    return fun


# ------------------------------------------------------------------------------------------------ evaluation, types, ad


def _evaluate(*args: Any, jaxpr: jc.ClosedJaxpr, **params: Any) -> Sequence[Any]:
    """Outside of `jit`: a jitted call that lives as long as the traced function (JAX's own rule would keep it for ever)."""

    def jitted() -> Any:
        run = lambda *xs: megakernel_p.bind(*xs, jaxpr=jaxpr, **params)
        run.__name__ = params["name"]
        return jax.jit(run)

    run: Callable[..., Sequence[Any]] = remembered(jaxpr, ("evaluate", *sorted(params.items())), jitted)
    if not jax.config.jax_disable_jit:
        return run(*args)
    with jax.disable_jit(False):
        return run(*args)


megakernel_p.def_impl(_evaluate)
megakernel_p.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (list(jaxpr.out_avals), jaxpr.effects))


class _Forward:
    """The function of the operands that gives the results, and the constants of the linear part with respect to those at
    `live`, with the number of that part in `linear`: (its jaxpr, which of its outputs depend on its inputs)."""

    def __init__(self, live: Sequence[int], jaxpr: jc.ClosedJaxpr):
        self.live, self.jaxpr = live, jaxpr
        self.linear: dict[int, tuple[Any, list[bool]]] = {}
        self.count = itertools.count()

    def __call__(self, *args: Any) -> Any:
        at = [args[i] for i in self.live]
        out, linear = jax.linearize(_restricted(args, self.live, self.jaxpr), *at)
        open_, constants = _compat.open_jaxpr(jax.make_jaxpr(linear)(*at))  # a tangent has the type of its primal
        number = next(self.count)
        self.linear[number] = open_, dependent(open_, [True] * len(open_.invars))
        return out, list(constants), Fact(number)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: jc.ClosedJaxpr, name: str, derived: bool,
         **params: Any) -> Any:  # fmt: skip
    """The forward pass depends on the primals alone, so `grad` runs it where it runs the function, once."""
    float0 = jax.dtypes.float0
    live = tuple(i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero) and jax.typeof(t).dtype != float0)
    if not live:
        out = megakernel_p.bind(*primals, jaxpr=jaxpr, name=name, derived=derived, **params)
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    forward = remembered(jaxpr, ("forward", live), functools.partial(_Forward, live, jaxpr))
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(*primals)
    names = lambda: _compat.argument_names(jaxpr)
    flat = call(closed, primals, name=f"{name}_forward", derived=True, arguments=names, **params)
    out, constants, number = jax.tree.unflatten(jax.tree.structure(shapes), flat)
    linear, depends = forward.linear[number.value]
    dout = jc.jaxpr_as_fun(jc.ClosedJaxpr(linear, constants))(*(tangents[i] for i in live))
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, [t if on else z for t, on, z in zip(dout, depends, zeros, strict=True)]


def _transpose(cts: Sequence[Any], *args: Any, jaxpr: jc.ClosedJaxpr, **_: Any) -> list[Any]:
    live = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]
    fun = _restricted(args, live, jaxpr)
    back = jax.linear_transpose(fun, *(args[i].aval for i in live))([ad.instantiate_zeros(c) for c in cts])
    out: list[Any] = [None] * len(args)
    for i, b in zip(live, back, strict=True):
        out[i] = b
    return out


def _batched(axis: Any, dims: Sequence[Any], mapped: Sequence[bool], jaxpr: jc.ClosedJaxpr) -> Callable[..., Any]:
    def fun(_mapped: Any, *xs: Any) -> list[Any]:  # `vmap` wants at least one mapped argument; nobody reads this one
        return reference(*xs, jaxpr=jaxpr)

    out: Callable[..., Any] = jax.vmap(fun, (0, *dims), [0 if on else None for on in mapped], axis_name=axis.name,
                                       axis_size=axis.size, spmd_axis_name=axis.spmd_name)  # fmt: skip
    return out


def _batch(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, jaxpr: jc.ClosedJaxpr, **params: Any) -> Any:
    """Results that depend on nothing mapped stay without the axis, as JAX has it."""
    named = any(type(e).__name__ == "NamedAxisEffect" for e in jaxpr.effects)
    mapped = dependent(jaxpr, [named or d is not None for d in dims]) if dims else [named] * len(jaxpr.out_avals)
    if not any(mapped):
        return megakernel_p.bind(*args, jaxpr=jaxpr, **params), [None] * len(mapped)
    key = ("batched", axis.name, axis.size, axis.spmd_name, tuple(dims))
    batched = remembered(jaxpr, key, functools.partial(_batched, axis, dims, mapped, jaxpr))
    leaves = [np.zeros(axis.size, np.float32), *args]
    names = lambda: ["", *_compat.argument_names(jaxpr)]
    out = call(jax.make_jaxpr(batched)(*leaves), leaves, arguments=names, **params)
    return out, [0 if on else None for on in mapped]


ad.primitive_jvps[megakernel_p] = _jvp
ad.primitive_transposes[megakernel_p] = _transpose
batching.fancy_primitive_batchers[megakernel_p] = _batch

# ------------------------------------------------------------------------------------------------------------- lowering

_to_xla = mlir.lower_fun(reference, multiple_results=True)
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


def _warn_once(name: str, error: Exception, cut: tuple[cuts.Cuts, float] | None = None) -> None:
    """`cut`: what is cut, and the microseconds that this is predicted to cost."""
    key = (name, str(error))
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    if isinstance(error, UnsupportedError):
        part = "the function"
        if cut is not None:
            pieces = plural(len(cut[0].kernels), "piece")
            part = f"a part of the function (the rest is in {pieces}; predicted cost {cut[1]:.0f} us a call)"
        text = f"megakernelize({name}) hands {part} to XLA: {error}"
    else:
        text = (f"megakernelize({name}) hands the function to XLA because of a bug in jax_mpk; please report it: "
                f"{type(error).__name__}: {error}")  # fmt: skip
    _compat.warn(text)


def _lower(platform: str | None, ctx: Any, *operands: Any, jaxpr: Any, implementation: str | None, options: Options,
           name: str, derived: bool) -> Sequence[Any]:  # fmt: skip
    """Lowers for `platform` (None: one without a backend). A named implementation raises what None only warns about, but
    for a forward pass, of which nobody said that it is a megakernel, and lets the prediction decide. A wrong option
    always raises."""
    if implementation != "xla":
        try:
            if platform is None or implementation not in (None, platform):
                raise UnsupportedError("megakernel", f"{name} is lowered for {'/'.join(_platforms(ctx))}, which the "
                                       f"implementation {implementation or 'for it'!r} does not serve")  # fmt: skip
            if implementation is None and (found := predict.faster_apart(jaxpr, platform, options)):
                if found.gaps:
                    located = UnsupportedError.of(found.gaps).located(_compat.here)
                    _warn_once(name, located, (found, predict.cost(found, platform, options)))
                return _lower_cut(ctx, operands, found, implementation=None, options=options, name=name)
            if implementation is not None or not predict.to_xla(jaxpr, platform, options, name):
                results: Sequence[Any] = backends.get(platform).lower(ctx, operands, jaxpr, options, name)
                return results
        except OptionError:
            raise
        except UnsupportedError as error:
            located = error.located(_compat.here)
            if implementation is not None and not derived and not options.split:
                raise located from None
            found = None
            if platform in backends.NAMES and implementation in (None, platform):
                found = cuts.cut(jaxpr, str(platform))
            _warn_once(name, located, (found, predict.cost(found, str(platform), options)) if found else None)
            if found:
                return _lower_cut(ctx, operands, found, implementation=implementation, options=options, name=name)
        except Exception as error:
            if implementation is not None:
                raise
            _warn_once(name, error)
    by_xla: Sequence[Any] = _to_xla(ctx, *operands, jaxpr=jaxpr)
    return by_xla


def _lower_cut(ctx: Any, operands: Sequence[Any], found: cuts.Cuts, *, name: str, **params: Any) -> Sequence[Any]:
    """The pieces of a function, each of which is chosen for, or goes to XLA, by itself."""

    def run(*args: Any) -> list[Any]:
        return found.run(args, lambda n, jaxpr, xs: call(jaxpr, xs, name=f"{name}_{n}", derived=True, **params))

    out: Sequence[Any] = mlir.lower_fun(run, multiple_results=True)(ctx, *operands)
    return out


def _platforms(ctx: Any) -> Sequence[str]:
    platforms: Sequence[str] = ctx.platforms or ctx.module_context.platforms
    return platforms


mlir.register_lowering(megakernel_p, functools.partial(_lower, None))
for _name in backends.NAMES:
    mlir.register_lowering(megakernel_p, functools.partial(_lower, _name), platform=_name)
