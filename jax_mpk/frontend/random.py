"""Random numbers: Threefry-2x32 in counter mode, so that a draw needs nothing but its key and its index.

A key array is a u32 tensor with one more dimension, of extent 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from jax_mpk import _compat
from jax_mpk.frontend.builder import Builder, Equation, Tensor, identity
from jax_mpk.frontend.convert import converted
from jax_mpk.frontend.registry import primitive
from jax_mpk.ir import expr as E
from jax_mpk.ir.expr import Coord, Expr

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _u32(n: int) -> Expr:
    return E.const(n, "u32")


def threefry(k0: Expr, k1: Expr, x0: Expr, x1: Expr) -> tuple[Expr, Expr]:
    """The Threefry-2x32 block function with 20 rounds (Salmon et al., 2011)."""
    add, xor = functools.partial(E.binary, "add"), functools.partial(E.binary, "xor")
    keys = (k0, k1, xor(xor(k0, k1), _u32(_PARITY)))
    x0, x1 = add(x0, k0), add(x1, k1)
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            x0 = add(x0, x1)
            x1 = xor(x0, E.binary("or", E.binary("shl", x1, _u32(r)), E.binary("shr", x1, _u32(32 - r))))
        x0 = add(x0, keys[(group + 1) % 3])
        x1 = add(add(x1, keys[(group + 2) % 3]), _u32(group + 1))
    return x0, x1


def _words(b: Builder, key: Tensor, axes: Sequence[Coord]) -> tuple[Expr, Expr]:
    """The words of the key at a point of the key array."""
    return tuple(key.at((*axes, E.coord_const(w))) for w in (0, 1))  # type: ignore[return-value]


def _counter(b: Builder, shape: tuple[int, ...], first: int) -> Expr:
    """The row-major index of a point in `shape`, whose axes start at `first`."""
    if math.prod(shape) > 2**31:
        b.unsupported("more than 2**31 draws")
    flat, stride = E.coord_const(0), 1
    for a in reversed(range(len(shape))):
        flat = E.coord_add(flat, E.coord_scale(E.coord_axis(first + a, shape[a]), stride))
        stride *= shape[a]
    return E.unary("i2u", E.index(flat))


@primitive("random_bits")
def _random_bits(b: Builder, eqn: Equation, key: Tensor) -> Tensor:
    width = eqn.params["bit_width"]
    if not _compat.threefry_partitionable() or width > 32:
        b.unsupported("only partitionable Threefry with up to 32 bits a draw is")
    axes, n = identity(eqn.shape), len(key.shape) - 1
    x0, x1 = threefry(*_words(b, key, axes[:n]), _u32(0), _counter(b, eqn.shape[n:], n))
    return b.map(eqn.shape, eqn.dtype, converted(E.binary("xor", x0, x1), "u32", eqn.dtype))


def _keys(b: Builder, shape: tuple[int, ...], words: tuple[Expr, Expr]) -> Tensor:
    return b.map(shape, "u32", E.piece(identity(shape)[-1], (0, 1, 2), words))


@primitive("random_fold_in")
def _fold_in(b: Builder, eqn: Equation, key: Tensor, data: Tensor) -> Tensor:
    if not _compat.threefry_partitionable():
        b.unsupported("only partitionable Threefry is")
    word = converted(data.over(eqn.shape[:-1]), data.dtype, "u32")
    axes = [E.coord_const(0) if n == 1 else c for n, c in zip(key.shape[:-1], identity(eqn.shape), strict=False)]
    return _keys(b, eqn.shape, threefry(*_words(b, key, axes), _u32(0), word))


@primitive("random_split")
def _split(b: Builder, eqn: Equation, key: Tensor) -> Tensor:
    if not _compat.threefry_partitionable():
        b.unsupported("only partitionable Threefry is")
    n = len(key.shape) - 1
    words = _words(b, key, identity(eqn.shape)[:n])
    return _keys(b, eqn.shape, threefry(*words, _u32(0), _counter(b, eqn.shape[n:-1], n)))


@primitive("random_seed")
def _seed(b: Builder, eqn: Equation, seed: Tensor) -> Tensor:
    return _keys(b, eqn.shape, (_u32(0), converted(seed.over(eqn.shape[:-1]), seed.dtype, "u32")))


@primitive("random_wrap", "random_unwrap", "random_clone")
def _wrap(b: Builder, eqn: Equation, x: Tensor) -> Tensor:
    return x


@primitive("threefry2x32")
def _threefry(b: Builder, eqn: Equation, *xs: Tensor) -> Sequence[Tensor]:
    return [b.map(eqn.shape, "u32", e) for e in threefry(*(x.over(eqn.shape) for x in xs))]
