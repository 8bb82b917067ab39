"""What the rules build with: tensors, new operators, and errors that point at the user's line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import numpy as np

from jax_mpk import _compat
from jax_mpk.abi import MAX_EXTENT
from jax_mpk.errors import UnsupportedError
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr
from jax_mpk.ir.graph import DTYPES, Map, Op, Source, Value, compute_dtype

DTYPE_NAMES = {
    "float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "i32", "int16": "i16", "int8": "i8",
    "uint32": "u32", "uint16": "u16", "uint8": "u8", "bool": "bool",
}  # fmt: skip


@functools.lru_cache(maxsize=1024)
def identity(shape: tuple[int, ...]) -> tuple[Coord, ...]:
    """The coordinates of a point of a domain of this shape."""
    return tuple(E.coord_axis(a, n) for a, n in enumerate(shape))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor during lowering: a value of the graph, or (`splat`) one scalar expression for every element."""

    shape: tuple[int, ...]
    dtype: str
    value: int = -1
    splat: Expr | None = None

    @property
    def compute(self) -> str:
        """The type in which expressions see the elements."""
        return compute_dtype(self.dtype)

    def at(self, coords: Sequence[Coord]) -> Expr:
        """The element at `coords`."""
        if self.splat is not None:
            return self.splat
        return E.load(self.value, tuple(coords), DTYPES[self.dtype][1])

    def over(self, shape: tuple[int, ...]) -> Expr:
        """The element that belongs to a point of a domain of `shape`: scalars and extents of 1 are repeated."""
        coords = identity(shape)
        if self.shape != shape:
            zero = E.coord_const(0)
            coords = tuple(c if n != 1 else zero for c, n in zip(coords, self.shape, strict=True)) if self.shape else ()
        return self.at(coords)


DEAD = Tensor((), "f32", splat=E.const(0.0, "f32"))
"""Stands for a result that nobody uses, or that has no elements."""


@dataclass(slots=True)
class Equation:
    """A jaxpr equation as the rules see it.

    Attributes: `outs`, the types of its results (shape, dtype name); `live`, which results anybody uses; `inherited`,
    the user's line when it was given by the call around the equation, else "".
    """

    raw: Any
    source: Source
    live: tuple[bool, ...]
    inherited: str = ""
    outs: tuple[tuple[tuple[int, ...], str], ...] = ()

    @property
    def primitive(self) -> str:
        return self.source.primitive

    @property
    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = self.raw.params
        return params

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result that is used."""
        return self.outs[self.live.index(True)][0]

    @property
    def dtype(self) -> str:
        return self.outs[self.live.index(True)][1]


@dataclass
class Builder:
    """The graph under construction and the equation being lowered. `platform`: what `platform_dependent` decides by."""

    platform: str = "cpu"
    values: dict[int, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    producers: dict[int, Op] = field(default_factory=dict)
    eqn: Equation | None = None
    consts: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    inline: Callable[..., list[Tensor]] = None  # type: ignore[assignment]
    """`inline(jaxpr, operands, live, where)`: lowers a nested jaxpr and gives its results; set by `lower`."""

    def value(self, shape: tuple[int, ...], dtype: str, **fields: Any) -> int:
        """A new value."""
        i = len(self.values)
        self.values[i] = Value(i, shape, dtype, **fields)
        return i

    def emit(self, op: Op) -> None:
        self.ops.append(op)
        for v in op.writes():
            self.producers[v] = op

    @property
    def source(self) -> Source:
        return self.eqn.source if self.eqn is not None else Source()

    def map(self, shape: tuple[int, ...], dtype: str, expr: Expr, domain: tuple[int, ...] | None = None,
            store: tuple[Coord, ...] | None = None) -> Tensor:  # fmt: skip
        """A new `Map`; an expression that reads nothing and is the same everywhere stays a splat, and so does nothing."""
        if 0 in shape:
            return Tensor(shape, dtype, splat=E.const(0, compute_dtype(dtype)))
        if store is None and not expr.loads and not expr.axes:
            return Tensor(shape, dtype, splat=expr)
        if (longest := max(domain or (), default=0)) > MAX_EXTENT:
            self.unsupported(f"a loop of {longest} steps, there may be {MAX_EXTENT}")
        out = self.value(shape, dtype)
        self.emit(Map(out, shape if domain is None else domain, self.source, store, expr=expr))
        return Tensor(shape, dtype, out)

    def materialise(self, t: Tensor) -> Tensor:
        """`t` as a value of the graph."""
        return t if t.splat is None else self.copy(t)

    def copy(self, t: Tensor) -> Tensor:
        """A new value with the elements of `t`."""
        out = self.value(t.shape, t.dtype)
        self.emit(Map(out, t.shape, self.source, None, expr=t.at(identity(t.shape))))
        return Tensor(t.shape, t.dtype, out)

    def stored(self, t: Tensor) -> Tensor:
        """`t` as a value that is read from memory: an operator with a place to store to is written into no other."""
        coords = identity(t.shape)
        return self.map(t.shape, t.dtype, t.at(coords), t.shape, coords)

    def constant(self, data: Any) -> Tensor:
        """A tensor of known data: a splat for a scalar, else a value of role "const"."""
        hit = self.consts.get(id(data))
        if hit is not None:
            return hit[0]
        if _compat.key_width(data.dtype):
            array = np.asarray(jax.random.key_data(data))
        else:
            self.dtype(data.dtype)
            array = np.asarray(data)
        shape, dtype = tuple(array.shape), self.dtype(array.dtype)
        if not math.prod(shape):
            t = Tensor(shape, dtype, splat=E.const(0, compute_dtype(dtype)))
        elif math.prod(shape) == 1:
            t = Tensor(shape, dtype, splat=E.const(array.reshape(-1)[0].item(), compute_dtype(dtype)))
        else:
            n = sum(v.role == "const" for v in self.values.values())
            t = Tensor(shape, dtype, self.value(shape, dtype, role="const", data=array, name=f"c{n}"))
        self.consts[id(data)] = t, data  # holds on to the data, so that the id stays its own
        return t

    def dtype(self, dtype: Any) -> str:
        """Our name of a NumPy or JAX dtype; raises `UnsupportedError` for those that kernels do not have."""
        name = DTYPE_NAMES.get(getattr(dtype, "name", None) or str(dtype))
        if name is None:
            self.unsupported(f"elements of type {dtype} are not supported")
        return name

    def unplaced(self) -> None:
        """Refuses an equation that puts values somewhere: a megakernel runs whole on each device that it is on, so a value
        in it is in no part of a mesh, and in no other memory."""
        for place in _compat.places(self.eqn.raw) if self.eqn is not None else ():
            self.unsupported(f"a value inside of a megakernel cannot be placed as {place}")

    def unsupported(self, reason: str) -> NoReturn:
        """Raises `UnsupportedError` for the equation being lowered."""
        if self.eqn is None:
            raise UnsupportedError("function", reason)
        operands = ", ".join(short(v.aval) for v in self.eqn.raw.invars)
        raise UnsupportedError(self.eqn.primitive, reason, operands, self.eqn.source.where)


def short(aval: Any) -> str:
    """A type as text."""
    return aval.str_short() if hasattr(aval, "str_short") else str(aval)


_NARROW = {"bf16": "round_bf16", "f16": "round_f16", "i8": "wrap_i8", "u8": "wrap_u8", "i16": "wrap_i16",
           "u16": "wrap_u16"}  # fmt: skip


def rounded(e: Expr, dtype: str) -> Expr:
    """The result of arithmetic, as an element of `dtype` holds it: rounded, or wrapped to the width."""
    op = _NARROW.get(dtype)
    return e if op is None else E.unary(op, e)


def as_i32(e: Expr) -> Expr:
    """An index of any integer type as i32 (large unsigned ones saturate, so that they stay out of bounds)."""
    if e.dtype == "i32":
        return e
    if e.dtype == "bool":
        return E.select(e, E.const(1, "i32"), E.const(0, "i32"))
    return E.unary("u2i", E.binary("min", e, E.const(2**31 - 1, "u32")))


def clamp(e: Expr, low: int, high: int) -> Expr:
    """The i32 expression `min(max(e, low), high)`."""
    return E.binary("min", E.binary("max", e, E.const(low, "i32")), E.const(high, "i32"))
