"""The compiler driver: a jaxpr through every pass to a verified program, with everything on the way kept and timed.

The list of passes is `PASSES`, and nothing else knows their order. `compile` keeps the stages (for people); `program`
is what a lowering needs: the blob, from memory, from disk, or compiled.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.extend.core as jc

from jax_mpk import _compat, abi
from jax_mpk.backends.cpu import pack as cpu
from jax_mpk.backends.cpu.operators import pressure
from jax_mpk.backends.cuda import pack as cuda
from jax_mpk.cache import Disk, Memory
from jax_mpk.device import Device
from jax_mpk.errors import OptionError, UnsupportedError
from jax_mpk.fingerprint import Unhashable, fingerprint, package_digest
from jax_mpk.frontend import lower
from jax_mpk.inspect.dump import listing
from jax_mpk.ir.graph import Graph, check
from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.options import Options
from jax_mpk.passes import (
    bodies,
    decompose,
    dependencies,
    events,
    fission,
    fuse,
    layout,
    linearise,
    memory,
    normalise,
    partial,
    placement,
    recognise,
    refine,
    simplify,
)
from jax_mpk.verify import Certificate, verify


@dataclass(frozen=True)
class Unit:
    """One function on its way through the passes; `graph`, `tasks`, `certificate`, `program`: the newest of each.
    `key`: everything that the program depends on, as 32 bytes; empty if it cannot be written down."""

    name: str
    jaxpr: jc.ClosedJaxpr
    target: Device
    key: bytes = b""
    graph: Graph | None = None
    tasks: TaskGraph | None = None
    certificate: Certificate | None = None
    program: bytes | None = None


@dataclass(frozen=True)
class Pass:
    """A pass: its name, which field of `Unit` it produces, and the function."""

    name: str
    produces: str
    run: Callable[[Any], Any]


def _emit(u: Unit) -> bytes:
    assert u.graph is not None and u.tasks is not None
    if u.target.gpu:
        return cuda.pack(u.graph, u.tasks, u.target, name=u.name, key=u.key)
    return cpu.pack(u.graph, u.tasks, name=u.name, key=u.key)


PASSES: tuple[Pass, ...] = (
    Pass("lower", "graph", lambda u: lower(u.jaxpr, name=u.name, platform=u.target.name)),
    Pass("simplify", "graph", lambda u: simplify.run(u.graph)),
    Pass("recognise", "graph", lambda u: recognise.run(u.graph)),
    Pass("fission", "graph", lambda u: fission.run(u.graph)),
    Pass("fuse", "graph", lambda u: fuse.run(u.graph, u.target)),
    Pass("partial", "graph", lambda u: partial.run(u.graph, u.target)),
    Pass("layout", "graph", lambda u: layout.run(u.graph)),
    Pass("refine", "graph", lambda u: refine.run(u.graph, None if u.target.gpu else pressure)),
    Pass("decompose", "tasks", lambda u: decompose.run(u.graph, u.target)),
    Pass("bodies", "tasks", lambda u: bodies.run(u.tasks, u.graph, u.target)),
    Pass("dependencies", "tasks", lambda u: dependencies.run(u.tasks)),
    Pass("events", "tasks", lambda u: events.run(u.tasks)),
    Pass("normalise", "tasks", lambda u: normalise.run(u.tasks)),
    Pass("linearise", "tasks", lambda u: linearise.run(u.tasks)),
    Pass("placement", "tasks", lambda u: placement.run(u.tasks, u.graph, u.target)),
    Pass("memory", "tasks", lambda u: memory.run(u.tasks)),
    Pass("emit", "program", _emit),
    Pass("verify", "certificate", lambda u: verify(u.program, target=u.target)),
)


@dataclass(frozen=True)
class Compiled:
    """A compiled function. `stages`: the product of every pass by its name (empty if the program came from disk);
    `times`: seconds per pass; `program`: the blob, or None if `stop_after` ended the compile before."""

    name: str
    jaxpr: jc.ClosedJaxpr
    target: Device
    program: bytes | None
    stages: dict[str, Any] = field(default_factory=dict, repr=False)
    times: dict[str, float] = field(default_factory=dict)

    def text(self, stage: str) -> str:
        """A stage in words: "jaxpr", the name of a pass, or "program" (the listing). `KeyError` names the stages."""
        if stage == "jaxpr":
            return str(self.jaxpr)
        stage = "emit" if stage == "program" else stage
        if stage not in self.stages:
            raise KeyError(f"no stage {stage!r}; there are jaxpr, {', '.join(self.stages)}")
        product = self.stages[stage]
        return listing(abi.decode(product)) if isinstance(product, bytes) else str(product)


_memory: Memory[Compiled] = Memory()
GRAPH = "refine"
"""The pass after which the graph is final."""


def clear_cache() -> None:
    """Forgets the compiled programs in memory (those on disk stay)."""
    _memory.clear()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """The passes make millions of small objects that live to the end: the cycle collector would only walk them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_deep = threading.Lock()
_depth = [0, 0]
"""How many compiles are under way, and the recursion limit that the first of them found."""
RECURSION = 100_000
"""Frames that walking an expression may take: a few per node of its longest path, which `fuse` bounds."""


@contextlib.contextmanager
def _recursive() -> Iterator[None]:
    """Expressions are nested deeper than JAX nests calls, and the caller's stack may be deep already."""
    with _deep:
        if not _depth[0]:
            _depth[1] = sys.getrecursionlimit()
            sys.setrecursionlimit(max(RECURSION, _depth[1]))
        _depth[0] += 1
    try:
        yield
    finally:
        with _deep:
            _depth[0] -= 1
            if not _depth[0]:
                sys.setrecursionlimit(_depth[1])


@_recursive()
@_uncollected()
def compile(
    closed: jc.ClosedJaxpr, target: Device, options: Options, *, name: str = "fn", last: str = PASSES[-1].name
) -> Compiled:
    """Runs the passes, or finds their results in memory and goes on from there. The returned stages are complete up to
    the pass `last`, or `options.stop_after`.

    Raises `UnsupportedError` (the function), `VerifyError` or `GraphError` (the compiler), `OptionError` (the options).
    """
    key = key_of(closed, target, options, name)
    hit = _memory.get(key) if key and may_reuse(options) else None
    if hit is not None and last in hit.stages:
        return hit
    unit = Unit(name, closed, target, key)
    stages, times = (dict(hit.stages), dict(hit.times)) if hit is not None else ({}, {})
    out = Compiled(name, closed, target, None, stages, times)
    dump = _dump_directory(options, name, key)
    _write(dump, 0, "jaxpr", lambda: str(closed))
    for n, p in enumerate(PASSES, 1):
        if p.name in stages:
            unit = replace(unit, **{p.produces: stages[p.name]})
            continue
        start = time.perf_counter()
        product = p.run(unit)
        if isinstance(product, Graph):
            check(product)
        times[p.name] = time.perf_counter() - start
        stages[p.name] = product
        unit = replace(unit, **{p.produces: product})
        out = Compiled(name, closed, target, unit.program, stages, times)
        _write(dump, n, p.name, functools.partial(out.text, p.name))
        if p.name == options.stop_after:
            return out
        if p.name == last:
            break
    if key and options.cache_entries:
        _memory.put(key, out, options.cache_entries)
    return out


def program(closed: jc.ClosedJaxpr, target: Device, options: Options, *, name: str = "fn") -> bytes:
    """The verified program of a jaxpr: from memory, from disk, or compiled (and then kept). Raises like `compile`."""
    key = key_of(closed, target, options, name)
    path = options.cache_path()
    disk = Disk(path, options.cache_bytes) if path is not None and key else None
    if key and may_reuse(options):
        hit = _memory.get(key)
        if hit is not None and hit.program is not None:
            return hit.program
        blob = disk.get(key) if disk else None
        if blob is not None:
            _memory.put(key, Compiled(name, closed, target, blob), options.cache_entries)
            return blob
    out = compile(closed, target, options, name=name)
    if out.program is None or PASSES[-1].name not in out.stages:  # nothing runs that was not verified
        raise UnsupportedError("megakernel", f"the compiler stopped after pass {options.stop_after!r}, as it was told")
    if disk:
        disk.put(key, out.program)
    return out.program


def may_reuse(options: Options) -> bool:
    """Whether programs may come from a cache: not where every pass is to be looked at."""
    return not (options.dump or options.stop_after)


def key_of(closed: jc.ClosedJaxpr, target: Device, options: Options, name: str) -> bytes:
    """Everything that a program depends on; empty if it cannot be written down."""
    try:
        random = _compat.threefry_partitionable()  # decides what random bits are
        return fingerprint(closed, package_digest(), abi.VERSION, target, options.codegen(), name, random)
    except Unhashable:
        return b""


def _dump_directory(options: Options, name: str, key: bytes) -> Path | None:
    if not options.dump:
        return None
    path = Path(options.dump) / f"{name}-{key.hex()[:8]}"
    with _dumping():
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _dumping() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OptionError(f"option dump: {e}") from e


def _write(dump: Path | None, number: int, stage: str, text: Callable[[], str]) -> None:
    if dump is not None:
        content = text() + "\n"
        with _dumping():
            (dump / f"{number:02d}_{stage}.txt").write_text(content)
