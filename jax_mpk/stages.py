"""`Lowered`: everything that the compiler made of one function for one set of argument types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.extend.core as jc

from jax_mpk import _compat, abi, backends, compiler, cuts, modules, predict
from jax_mpk import options as opts
from jax_mpk.errors import UnsupportedError
from jax_mpk.inspect import cost, draw, explain, profile, text
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.primitive import megakernel_p


@dataclass(frozen=True)
class Lowered:
    """The stages of a compiled function. With `stop_after`, stages beyond it raise `KeyError`."""

    compiled: compiler.Compiled
    choice: predict.Choice | None = None
    """What `implementation=None` chooses here; None where nothing is to be chosen."""

    @property
    def jaxpr(self) -> Any:
        """The closed jaxpr that the megakernel computes; captured arrays are its first operands."""
        return self.compiled.jaxpr

    def graph(self, pass_name: str | None = None) -> Graph:
        """The op graph after a pass ("lower", "simplify", "recognise", "fuse", "refine"; None: the last one)."""
        graphs = {k: v for k, v in self.compiled.stages.items() if isinstance(v, Graph)}
        graph: Graph = self._pick(graphs, pass_name)
        return graph

    def tasks(self, pass_name: str | None = None) -> TaskGraph:
        """The task graph after a pass ("decompose", ..., "memory"; None: the last one)."""
        graphs = {k: v for k, v in self.compiled.stages.items() if isinstance(v, TaskGraph)}
        tasks: TaskGraph = self._pick(graphs, pass_name)
        return tasks

    def _pick(self, products: Mapping[str, Any], name: str | None) -> Any:
        if not products or (name is not None and name not in products):
            raise KeyError(f"no such stage after pass {name!r}; there are {', '.join(products) or 'none'}")
        return products[name] if name is not None else list(products.values())[-1]

    @property
    def certificate(self) -> Any:
        """What the verifier proved."""
        return self._pick(self.compiled.stages, "verify")

    @property
    def program(self) -> bytes:
        """The program blob (`jax_mpk.abi.decode` reads it)."""
        blob: bytes = self._pick(self.compiled.stages, "emit")
        return blob

    @property
    def compile_times(self) -> dict[str, float]:
        """Seconds per pass."""
        return dict(self.compiled.times)

    def text(self, stage: str) -> str:
        """Any stage as text: "jaxpr", the name of a pass, or "program"."""
        return self.compiled.text(stage)

    def explain(self) -> str:
        """What `implementation=None` chooses and why; operators, tasks, events, bytes, and every hop with the input that
        makes it wait."""
        text = explain.explain(self.compiled)
        if self.choice is None:
            return text
        return f"{self.choice}\n{'the megakernel would be ' if self.choice.to_xla else ''}{text}"

    def draw(self, file: Any = None) -> str:
        """The task graph as SVG text, also written to the path `file`."""
        return text.written(draw.draw(self.tasks("events"), self.compiled.name), file)

    def cost_analysis(self) -> cost.Cost:
        """Flops and bytes per operator and in total."""
        return cost.cost(self.graph(), self.tasks("events"))


def lower(wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
    """Compiles a `Megakernelized` for arguments or `jax.ShapeDtypeStruct`s; see `Megakernelized.lower`."""
    eqn, platform, options, *_ = _Traced.of(wrapped, args, kwargs)
    try:
        return _lowered(wrapped, eqn.params["jaxpr"], platform, options, eqn.params["name"])
    except UnsupportedError as error:
        raise error.located(_compat.here) from None


def _lowered(wrapped: Any, jaxpr: Any, platform: str, options: opts.Options, name: str) -> Lowered:
    compiled = compiler.compile(jaxpr, backends.get(platform).device(options), options, name=name)
    chooses = wrapped.implementation is None and options.choose and not options.stop_after
    return Lowered(compiled, predict.choice(jaxpr, platform, options, name) if chooses else None)


def explained(wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """`Lowered.explain` of a `Megakernelized`; of one that is cut, what is cut out and every piece."""
    eqn, platform, options, *_ = _Traced.of(wrapped, args, kwargs)

    def of(jaxpr: Any, name: str) -> str:
        found = predict.faster_apart(jaxpr, platform, options) if wrapped.implementation is None else None
        why = ""
        if found is None:
            try:
                return _lowered(wrapped, jaxpr, platform, options, name).explain()
            except UnsupportedError as error:
                located = error.located(_compat.here)
            found = cuts.cut(jaxpr, platform) if wrapped.implementation is None or options.split else None
            if found is None:
                raise located
            why = f"\nbecause {located}"
        return "\n\n".join([f"{found}{why}", *(of(x, f"{name}_{n}") for n, x in enumerate(found.kernels))])

    return of(eqn.params["jaxpr"], eqn.params["name"])


def profiled(wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> profile.Profile:
    """The profile of one launch of a `Megakernelized`; see `Megakernelized.profile`."""
    traced = _Traced.of(wrapped, args, kwargs)
    eqn, platform, options, *_ = traced
    backend, name = backends.get(platform), eqn.params["name"]
    on = replace(backend.device(options), profile=True)
    try:
        compiled = compiler.compile(eqn.params["jaxpr"], on, options, name=name)
    except UnsupportedError as error:
        raise error.located(_compat.here) from None
    lowered = Lowered(compiled)
    p = abi.decode(lowered.program)
    results = [_words(a) for a in lowered.jaxpr.out_avals]
    at, worker = backend.times(p, on, results, traced.operands(), options)
    where = {g.name: g.source for g in lowered.tasks("events").grids}
    read = {o.name: o.read for o in lowered.cost_analysis().ops}
    return profile.profile(p, platform, name, at, worker, where, read)


def predicted(wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> predict.Choice:
    """What would be chosen for a `Megakernelized`; see `Megakernelized.predict`."""
    eqn, platform, options, *_ = _Traced.of(wrapped, args, kwargs)
    try:
        return predict.choice(eqn.params["jaxpr"], platform, options, eqn.params["name"])
    except UnsupportedError as error:
        raise error.located(_compat.here) from None


class _Traced(NamedTuple):
    """The equation of the primitive, the platform that it is for, and the options in force."""

    eqn: Any
    platform: str
    options: opts.Options
    closed: Any
    leaves: Sequence[Any]
    """The jaxpr that has the equation, and its arguments."""

    @classmethod
    def of(cls, wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced:
        fn, args, kwargs = wrapped._statics.split((*wrapped._bound, *args), kwargs)
        shard = wrapped._shard
        call = wrapped._sharded(fn) if shard is not None else lambda *a, **k: wrapped._call(fn, *a, **k)
        closed, leaves = modules.make_jaxpr(call, args, kwargs)
        eqn = next(_megakernels(closed.jaxpr), None)
        if eqn is None:
            name = wrapped._name()
            raise UnsupportedError("megakernel", f"{name} computes nothing, or only what its side effects allow")
        platform = wrapped.implementation
        if platform in (None, "xla"):
            platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        return cls(eqn, platform, opts.current(wrapped._options), closed, leaves)

    def operands(self) -> list[Any]:
        """What the equation is applied to: arrays, keys as their words. Raises `TypeError` for what has no values."""
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in self.leaves):
            raise TypeError("a profile runs the function: its arguments are arrays, not jax.ShapeDtypeStruct")
        jaxpr = self.closed.jaxpr
        at = next((n for n, e in enumerate(jaxpr.eqns) if e is self.eqn), None)
        if at is None:
            raise UnsupportedError(
                "megakernel", "one that is sharded, or inside of another function, has no profile of its own"
            )
        before = jaxpr.replace(eqns=jaxpr.eqns[:at], outvars=list(self.eqn.invars),
                               debug_info=_compat.renamed(jaxpr.debug_info, _compat.argument_names(jaxpr), [""] * len(self.eqn.invars)))  # fmt: skip
        out: list[Any] = jc.jaxpr_as_fun(jc.ClosedJaxpr(before, self.closed.consts))(*self.leaves)
        return [jax.random.key_data(x) if _compat.key_width(x.dtype) else x for x in out]


def _words(aval: Any) -> jax.ShapeDtypeStruct:
    """An array as it lies in memory: a key is some words."""
    words = _compat.key_width(aval.dtype)
    return (
        jax.ShapeDtypeStruct((*aval.shape, words), "uint32") if words else jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    )


def _megakernels(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is megakernel_p:
            yield eqn
        else:
            for p in eqn.params.values():
                if hasattr(p, "eqns"):
                    yield from _megakernels(p)
