"""Families of operations over windows, of groups, by functions of the caller's, and of bits: see `tests.fuzz.grow`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tests.fuzz.case import FLOATS, INTEGERS, numpy_dtype

if TYPE_CHECKING:
    from tests.fuzz.grow import Grower


def _pairs(g: Grower, count: int, low: int, high: int) -> str:
    return f"[{', '.join(f'({g.up_to(high, low)}, {g.up_to(high, low)})' for _ in range(count))}]"


def _steps(g: Grower, count: int, most: int = 3) -> tuple[int, ...]:
    return tuple(g.up_to(most, 1) if g.chance(0.3) else 1 for _ in range(count))


def _divisor(g: Grower, n: int) -> int:
    return int(g.one(*[d for d in range(1, min(n, 8) + 1) if n % d == 0])) if g.chance(0.35) else 1


def convolution(g: Grower) -> None:
    """Any variable of rank 3 to 5 as an activation, its dimensions in any order; a new kernel."""
    v = g.pick(*FLOATS, rank=3) if g.chance(0.85) else g.pick(*INTEGERS, rank=3)
    if v is None or len(v.shape) > 5:
        return
    space = "XYZ"[: len(v.shape) - 2]
    order = lambda letters: "".join(letters[i] for i in g.r.permutation(len(letters)))  # noqa: E731
    left, right, out = order("NC" + space), order("OI" + space), order("NC" + space)
    size = dict(zip(left, v.shape, strict=True))
    groups = _divisor(g, size["C"])
    images = _divisor(g, size["N"]) if groups == 1 and g.chance(0.3) else 1
    kernel = {a: g.up_to(4, 1) for a in space} | {
        "I": size["C"] // groups, "O": groups * images * int(g.one(1, 1, 2, 3, 9))}  # fmt: skip
    shape = tuple(kernel[a] for a in right)
    if math.prod(shape) > 20_000 or math.prod(v.shape) * math.prod(shape) > 20_000_000:
        return
    w = g.operand(shape, v.dtype, "" if v.dtype in INTEGERS else "normal")
    spread = _steps(g, len(space)) if g.chance(0.3) else (1,) * len(space)
    same = repr(str(g.one("SAME", "VALID"))) if set(spread) == {1} and g.chance(0.5) else _pairs(g, len(space), -1, 3)
    text = (f"lax.conv_general_dilated({v.name}, {w.name}, {_steps(g, len(space))}, {same}, {spread}, {_steps(g, len(space))}, "
            f"('{left}', '{right}', '{out}'), {groups}, {images})")  # fmt: skip
    g.add(text, v.dtype in INTEGERS and v.exact and w.exact)


def _window(g: Grower, rank: int) -> str:
    """Sizes, strides, padding and dilations."""
    size = tuple(g.up_to(3, 1) if g.chance(0.7) else 1 for _ in range(rank))
    pad = repr(str(g.one("SAME", "VALID"))) if g.chance(0.5) else _pairs(g, rank, 0, 2)  # XLA:CPU aborts on less
    steps, base, dilation = _steps(g, rank), _steps(g, rank, 2), _steps(g, rank, 2)
    if (
        steps == size
    ):  # XLA:CPU makes a reduction of windows side by side, and forgets that there are gaps in the operand
        base = (1,) * rank
    return f"{size}, {steps}, {pad}, {base}, {dilation}"


def pooling(g: Grower) -> None:
    v = g.pick(*FLOATS, *INTEGERS, rank=1)
    if v is None:
        return
    window = _window(g, len(v.shape))
    if v.dtype in FLOATS:
        op, init = g.one(
            ("lax.max", "-jnp.inf"), ("lax.min", "jnp.inf"), ("lax.add", "0"), ("jnp.logaddexp", "-jnp.inf")
        )
    else:
        info = np.iinfo(numpy_dtype(v.dtype))
        op, init = g.one(("lax.max", info.min), ("lax.min", info.max), ("lax.add", "0"), ("lax.bitwise_xor", "0"))
    exact = v.exact and (v.dtype in INTEGERS or op in ("lax.max", "lax.min"))
    g.add(f"lax.reduce_window({v.name}, jnp.array({init}, {v.name}.dtype), {op}, {window})", exact)


def pool_derivative(g: Grower) -> None:
    """Of distinct numbers: where two are equal, it is a matter of the implementation which one a window takes."""
    v = g.pick(*FLOATS, *INTEGERS, exact=True, rank=1)
    if v is None or len(v.shape) > 4:
        return
    rank = len(v.shape)
    x = f"jnp.argsort(jnp.argsort({v.name}.ravel())).reshape({v.shape}).astype(jnp.float32)"
    size = tuple(g.up_to(3, 1) for _ in range(rank))
    op, init = g.one(("lax.max", "-jnp.inf"), ("lax.min", "jnp.inf"))
    pool = f"lambda t: lax.reduce_window(t, {init}, {op}, {size}, {_steps(g, rank)}, {g.one('SAME', 'VALID')!r})"
    t = g.operand(v.shape, "float32", "normal")
    text = g.one(f"jax.grad(lambda t: ((({pool})(t)) ** 2).sum())({x})", f"jax.jvp({pool}, ({x},), ({t.name},))[1]")
    g.add(str(text), False)


SPECIAL = ("lax.erf_inv(jnp.clip({}, -0.99, 0.99))", "lax.lgamma(jnp.abs({}) + 0.5)", "lax.digamma(jnp.abs({}) + 0.5)", "jnp.log2(jnp.abs({}) + 1)",
           "lax.erfc({})", "jnp.sinh(jnp.clip({}, -9, 9))", "lax.cumlogsumexp({}, {d})", "lax.cumlogsumexp({}, {d}, reverse=True)",
           "lax.reduce({}, jnp.array(-jnp.inf, {}.dtype), jnp.logaddexp, ({d},))", "lax.platform_dependent({}, cpu=jnp.sin, cuda=jnp.sin, default=jnp.cos)",
           "jnp.asinh({})", "jnp.arctanh(jnp.clip({}, -0.9, 0.9))", "jax.scipy.special.xlogy(jnp.abs({}), jnp.abs({}) + 1)")  # fmt: skip


def special(g: Grower) -> None:
    v = g.pick(*FLOATS, rank=1)
    if v is not None:
        g.add(str(g.one(*SPECIAL)).replace("{}", v.name).replace("{d}", str(g.axis(v))), False)


def bits(g: Grower) -> None:
    """Elements seen as others of any width; neighbours of floats; exclusive or along an axis."""
    v = g.pick(*FLOATS, *INTEGERS, exact=True, rank=1)
    if v is None:
        return
    to, have = str(g.one(*FLOATS, *INTEGERS)), numpy_dtype(v.dtype).itemsize
    if v.dtype in FLOATS and g.chance(0.4):
        g.add(f"normal(lax.nextafter({v.name}, {g.operand(v.shape, v.dtype).name}))", True)
        return
    if v.dtype in INTEGERS and g.chance(0.3):
        g.add(f"lax.reduce_xor({v.name}, ({g.axis(v)},))", True)
        return
    want = numpy_dtype(to).itemsize
    if v.dtype in FLOATS or to in FLOATS:  # the bits of a NaN are nobody's
        v_name = f"jnp.where(jnp.isnan({v.name}), 1, {v.name})" if v.dtype in FLOATS else v.name
    else:
        v_name = v.name
    if want > have:
        n = math.prod(v.shape)
        if n % (want // have):
            return
        v_name = f"{v_name}.reshape(-1, {want // have})"
    out = f"lax.bitcast_convert_type({v_name}, jnp.{to})"
    g.add(f"normal(jnp.nan_to_num({out}))" if to in FLOATS else out, True)


def search(g: Grower) -> None:
    v = g.pick(*FLOATS, *INTEGERS, exact=True, rank=1)
    if v is None:
        return
    w, d = g.operand((g.up_to(9, 1),), v.dtype), g.axis(v)
    k = g.up_to(v.shape[d], 1)
    forms = [f"jnp.searchsorted(jnp.sort({v.name}.ravel()), {w.name}, side={g.one('left', 'right')!r})",
             f"jnp.searchsorted(jnp.sort({v.name}.ravel()), {w.name}, method={g.one('sort', 'compare_all', 'scan_unrolled')!r})",
             f"lax.top_k(jnp.swapaxes({v.name}, {d}, -1), {k})[{g.up_to(1)}]"]  # fmt: skip
    if v.dtype in FLOATS:
        forms += [
            f"lax.approx_{g.one('max', 'min')}_k(jnp.nan_to_num({v.name}), {k}, {d})[0]"
        ]  # XLA leaves open where NaN is
    g.add(str(g.one(*forms)), True)


def combine(g: Grower) -> None:
    """Scatters that combine with what is there, by an operation or a function."""
    v = g.pick(*FLOATS, *INTEGERS, rank=1)
    if v is None:
        return
    n, many = v.shape[0], g.up_to(4, 1)
    index = g.operand((many,), "int32", "index", n).name
    u = g.operand((many, *v.shape[1:]), v.dtype)
    how = str(g.one("max", "min", "mul", "subtract"))
    mode = g.one("", ", mode='drop'", ", mode='clip'")
    step = g.one("lambda t: t + 2", "lambda t: t * 3", "lambda t: jnp.maximum(t, 1)")
    text = g.one(f"{v.name}.at[{index}].{how}({u.name}{mode})", f"{v.name}.at[{index}].{how}({u.name}{mode})",
                 f"{v.name}.at[{index}].apply({step})", f"{v.name}.at[{g.up_to(n - 1)}].apply(lambda t: t * t - 1)")  # fmt: skip
    g.add(str(text), v.exact and u.exact and (v.dtype in INTEGERS or how in ("max", "min") and f".{how}(" in str(text)))


def ragged(g: Grower) -> None:
    v = g.pick("float32", "bfloat16", rank=2)
    if v is None or len(v.shape) != 2 or v.shape[0] > 64 or v.shape[1] > 64:
        return
    groups, n = g.up_to(5, 1), g.up_to(9, 1)
    w = g.operand((groups, v.shape[1], n), v.dtype, "normal")
    sizes = np.diff(np.sort(g.r.integers(0, v.shape[0] + 1, groups)), prepend=0).tolist()
    g.add(f"lax.ragged_dot({v.name}, {w.name}, jnp.array({sizes}, jnp.int32))", False)


def empties(g: Grower) -> None:
    """Arrays without elements on the way."""
    v = g.pick(*FLOATS, *INTEGERS, rank=1)
    if v is None:
        return
    none = f"{v.name}[:0]"
    shape = (0, *v.shape[1:])
    g.add(str(g.one(f"jnp.concatenate([{none}, {v.name}, jnp.zeros({shape}, {v.name}.dtype)])", f"jnp.sum({none}, 0) + {v.name}",
                    f"{v.name}.at[jnp.zeros((0,), jnp.int32)].set({none})", f"jnp.split({v.name}, [0, {g.up_to(v.shape[0])}])[2]",
                    f"jnp.pad({none}, [(1, 1)] + [(0, 0)] * {len(v.shape) - 1}) * {v.name}[:1]",
                    f"jax.jit(lambda t, e: t + jnp.sum(e, 0))({v.name}, {none})")), v.exact)  # fmt: skip


FAMILIES = {
    convolution: 2.0, pooling: 1.0, pool_derivative: 0.3, special: 1.2, bits: 0.8, search: 0.6, combine: 0.8, ragged: 0.3,
    empties: 0.4,
}  # fmt: skip
"""How often each is tried."""
