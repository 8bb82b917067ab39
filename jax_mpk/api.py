"""`megakernelize`: the function that users call."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jax_mpk import modules, primitive
from jax_mpk import options as opts
from jax_mpk.options import Options
from jax_mpk.trace import forwarded

_SHARDED = "updates inside of a function with a mesh do not come out of it: return what changed"


def megakernelize(
    fn: Callable[..., Any] | None = None,
    *,
    implementation: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
) -> Any:
    """`fn` as one persistent kernel: same arguments, same results, any pytrees (Flax modules and states included).

    Use it inside `jax.jit`; `grad`, `vmap`, `scan`, `shard_map`, `export` and donation work as on any JAX function.
    Also a decorator, with or without arguments.

    Args:
      fn: a pure JAX function of arrays (any shapes; types as the chosen implementation supports them), also a method of a
        `flax.nnx` module, or one that is called. What it does to modules among its arguments arrives at the caller.
      implementation: "cuda", "cpu" (the megakernel of that platform), "xla" (plain XLA), or None: the platform's
        megakernel where it is predicted to be faster than XLA; where it cannot be made, XLA with a `MegakernelWarning`
        that names the reason and source line.
      options: an `Options`, or a mapping of knobs to change; read when `fn` is traced.
      mesh, in_specs, out_specs: run `fn` on every device of the mesh on its part, as `jax.shard_map` does.
      static_argnums, static_argnames: arguments that are Python values, as in `jax.jit`; they must be hashable.

    Returns:
      A callable with `lower`, `explain`, `draw` and `cost_analysis`, which take the same arguments as `fn`.

    Raises:
      TypeError, ValueError: wrong arguments of this function (`OptionError`: a wrong knob). When the result is traced:
      `StateError` for an update of a module that would be lost. When it is lowered with a named implementation:
      `UnsupportedError` for what it cannot do, `VerifyError` if the compiler made a mistake.
    """
    if fn is None:
        return functools.partial(
            megakernelize, implementation=implementation, options=options, mesh=mesh, in_specs=in_specs,
            out_specs=out_specs, static_argnums=static_argnums, static_argnames=static_argnames,
        )  # fmt: skip
    if not callable(fn):
        raise TypeError(f"megakernelize takes a function, not {type(fn).__name__}")
    if implementation not in primitive.IMPLEMENTATIONS:
        known = ", ".join(map(repr, primitive.IMPLEMENTATIONS))
        raise ValueError(f"implementation is one of {known}, not {implementation!r}")
    if mesh is None and (in_specs is not None or out_specs is not None):
        raise ValueError("in_specs and out_specs need a mesh")
    if mesh is not None and (in_specs is None or out_specs is None):
        raise ValueError("a mesh needs in_specs and out_specs")
    opts.current(options)  # wrong options fail here, not at the first trace
    body, bound = modules.unbound(fn) if mesh is None else (fn, ())
    statics = _Statics(body, static_argnums, static_argnames, len(bound))
    shard = (
        None if mesh is None else functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    )
    return Megakernelized(fn, implementation, options, statics, shard, bound)


class _Statics:
    """Which arguments are static, and per set of their values the function of the others (one object, so that JAX
    recognises it and traces it once). `bound`: how many arguments come before those that the numbers count."""

    def __init__(self, fn: Callable[..., Any], nums: int | Iterable[int], names: str | Iterable[str], bound: int):
        self.fn, self.bound = fn, bound
        given = {n if n < 0 else n + bound for n in ({nums} if isinstance(nums, int) else set(nums))}
        self.names = {names} if isinstance(names, str) else set(names)
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        if any(n < 0 for n in given) and not parameters:
            raise ValueError("negative static_argnums need a function with a signature")
        self.nums = {n % len(parameters) if n < 0 else n for n in given}
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        keywords = any(p.kind == p.VAR_KEYWORD for p in parameters)
        if parameters and not variadic and any(n >= len(positional) for n in self.nums):
            raise ValueError(f"static_argnums {sorted(self.nums)} but {fn} has {len(positional)} positional arguments")
        unknown = self.names - {p.name for p in parameters}
        if parameters and unknown and not keywords:
            raise ValueError(f"static_argnames {sorted(unknown)} are no arguments of {fn}")
        self.names |= {positional[n] for n in self.nums if n < len(positional)}
        self.nums |= {n for n, name in enumerate(positional) if name in self.names}
        self._variant = functools.lru_cache(maxsize=256)(self._make)

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The function of the dynamic arguments, and these."""
        if not self.nums and not self.names:
            return self.fn, args, kwargs
        fixed = tuple((n, type(a), a) for n, a in enumerate(args) if n in self.nums)
        named = tuple((k, type(v), v) for k, v in sorted(kwargs.items()) if k in self.names)
        for key, kind, value in (*fixed, *named):
            try:
                hash(value)
            except TypeError:
                raise ValueError(f"static argument {key!r} is a {kind.__name__}, which is not hashable") from None
        dynamic = tuple(a for n, a in enumerate(args) if n not in self.nums)
        rest = {k: v for k, v in kwargs.items() if k not in self.names}
        return self._variant(fixed, named), dynamic, rest

    def heads(self, n: int) -> list[str]:
        """What the first `n` dynamic positional arguments are called."""
        places = itertools.islice((i for i in itertools.count() if i not in self.nums), n)
        return [f"args[{i - self.bound}]" if i >= self.bound else "self" for i in places]

    def _make(self, fixed: tuple[Any, ...], named: tuple[Any, ...]) -> Callable[..., Any]:
        positions = {n: value for n, _, value in fixed}
        keywords = {k: value for k, _, value in named}

        @functools.wraps(self.fn)
        def variant(*args: Any, **kwargs: Any) -> Any:
            dynamic = iter(args)
            full = [positions[n] if n in positions else next(dynamic) for n in range(len(args) + len(positions))]
            return self.fn(*full, **kwargs, **keywords)

        return variant


class Megakernelized:
    """What `megakernelize` returns. A call traces `fn` (once per types and static values) and binds one primitive."""

    def __init__(self, fn: Callable[..., Any], implementation: str | None, options: Any, statics: _Statics, shard: Any,
                 bound: tuple[Any, ...]):  # fmt: skip
        self.implementation = implementation
        self._options, self._statics, self._shard, self._bound = options, statics, shard, bound
        self._sharded = functools.lru_cache(maxsize=256)(self._make_sharded)
        self.__wrapped__ = fn
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fn, args, kwargs = self._statics.split((*self._bound, *args), kwargs)
        if self._shard is None:
            return self._call(fn, *args, **kwargs)
        return self._sharded(fn)(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"megakernelize({getattr(self.__wrapped__, '__qualname__', self.__wrapped__)})"

    def _call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heads = self._statics.heads(len(args))
        if modules.among((args, kwargs)):
            return modules.call(fn, args, kwargs, self._run, heads, lost=_SHARDED if self._shard else "")
        return self._run(fn, args, kwargs, functools.partial(modules.argument_names, heads, (args, kwargs)))[0]

    def _run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: Callable[[], Any]
    ) -> Any:
        """The result of a function of pytrees, and a function that gives, in its place, for each leaf the number of the flat
        argument that it is, or -1."""
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        out = primitive.call(closed, jax.tree.leaves((args, kwargs)), implementation=self.implementation,
                             options=opts.current(self._options), name=self._name(), arguments=names)  # fmt: skip
        unflatten = functools.partial(jax.tree.unflatten, jax.tree.structure(shapes))
        return unflatten(out), lambda: unflatten(forwarded(closed))

    def _make_sharded(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        sharded: Callable[..., Any] = self._shard(functools.partial(self._call, fn))
        return sharded

    def _name(self) -> str:
        return getattr(self.__wrapped__, "__name__", type(self.__wrapped__).__name__)

    # ------------------------------------------------------------------------------------------------- for people

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Compiles for these arguments (arrays or `jax.ShapeDtypeStruct`s) and returns every stage: a `stages.Lowered`.

        The platform is the implementation's; with None (or "xla") it is JAX's default backend. Raises what compiling
        raises, also where a call would fall back to XLA.
        """
        from jax_mpk.stages import lower

        return lower(self, args, kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """What the megakernel does for these arguments: operators, tasks, bytes, and every hop with its reason. Of a function
        that is cut (`jax_mpk.cuts`): what XLA runs and why, and every piece."""
        from jax_mpk.stages import explained

        return explained(self, args, kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicted microseconds of XLA and of the megakernel for these arguments, and which of them `implementation=None`
        would choose: a `jax_mpk.predict.Choice`. Raises `UnsupportedError` where there is no choice."""
        from jax_mpk.stages import predicted

        return predicted(self, args, kwargs)

    def profile(self, *args: Any, **kwargs: Any) -> Any:
        """Where each microsecond of a launch on these arrays goes, per operator and per worker: a
        `jax_mpk.inspect.profile.Profile`, which prints as a table, and has `trace(file)` for Perfetto and `svg(file)`.

        The launch is one of a program that leaves times, after a few others; calls of the function itself do not. On a GPU
        that adds about 0.7 us to every hop. Raises `UnsupportedError` for what is no megakernel of its own.
        """
        from jax_mpk.stages import profiled

        return profiled(self, args, kwargs)

    def draw(self, *args: Any, file: Any = None, **kwargs: Any) -> str:
        """The task graph as SVG text, also written to `file` (a path) if given."""
        return str(self.lower(*args, **kwargs).draw(file=file))

    def cost_analysis(self, *args: Any, **kwargs: Any) -> Any:
        """Flops and bytes, per operator and in total: see `jax_mpk.inspect.cost.Cost`."""
        return self.lower(*args, **kwargs).cost_analysis()
