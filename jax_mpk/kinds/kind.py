"""What a task kind is to the compiler: one object per kind, one file per object.

A kind says how its operators are cut into tasks, what their bodies are, what they cost, and on what
functions it is tested and timed. Boxes are derived from the accesses (`jax_mpk.ir.loops`), dependencies from boxes; the
reference is `jax_mpk.ir.interpret`. The bodies are `ffi/cpu/isa/` and `cuda/kinds/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_mpk.device import Device
from jax_mpk.ir.graph import Graph, Op
from jax_mpk.ir.loops import LoopAxis

if TYPE_CHECKING:
    from jax_mpk.backends.cuda.struct import Struct
    from jax_mpk.ir.body import Body
    from jax_mpk.kinds.bound import Bound


@dataclass(frozen=True)
class Case:
    """A function that exercises a kind, for tests and benchmarks: `fn(*make(rng))`."""

    name: str
    fn: Callable[..., Any]
    make: Callable[[np.random.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class TaskKind:
    """name: as in `Op.kind` and in messages. ops: the operator classes that it runs.

    tile(graph, op, target): axis id -> tile, for the axes that are cut (it may depend on the target, never on the
    number of workers of a run). body(bound, op): what a task does.
    work(op): (flops of the core, scalar work of the fused expressions). variant(bound, body, device, fixed): how a GPU
    runs it (a `Variant`), given the values that are only read. source(struct, variant): the call of a task, and the struct that it is instantiated with.
    files: the texts of its cores, in `cuda/`. core(op): scalar work of the core itself, for the prediction.
    """

    name: str
    ops: tuple[type[Op], ...]
    tile: Callable[[Graph, Any, Device], dict[int, int]]
    body: Callable[[Bound, Any], Body]
    work: Callable[[Any], tuple[int, int]]
    variant: Callable[[Bound, Body, Device, Collection[int]], Any]
    source: Callable[[Struct, Any], tuple[str, str]]
    cases: tuple[Case, ...] = field(default=())
    files: tuple[str, ...] = ()
    core: Callable[[Any], int] = lambda _: 0


def cut(axes: Iterable[LoopAxis], wanted: int, fixed: frozenset[int] = frozenset(), inner: int = 1) -> dict[int, int]:
    """Tiles that give about `wanted` tasks, outer axes first; the innermost axis is cut in multiples of `inner`."""
    tile: dict[int, int] = {}
    axes = list(axes)
    for n, x in enumerate(axes):
        if wanted <= 1 or x.axis in fixed or x.extent <= 1:
            continue
        t = math.ceil(x.extent / min(x.extent, wanted))
        if n == len(axes) - 1:
            t = min(x.extent, math.ceil(t / inner) * inner)
        tile[x.axis] = t
        wanted = math.ceil(wanted / math.ceil(x.extent / t))
    return tile


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Random operands of a case."""
    return rng.normal(size=shape).astype(dtype)
