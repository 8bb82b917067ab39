"""A random function: operands made from seeds, and lines of Python that compute one variable each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int32", "uint32", "int8", "uint8", "int16", "uint16")
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, 65504.0, 1e30, -1e30, 2.0**-126)
"""Sums of a few of these do not overflow: where a partial sum does depends on its order."""


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@dataclass(frozen=True)
class Operand:
    """`kind`: "normal" | "special" | "small" (integers -4..4) | "wide" (all bits of the type) | "index" (-2..limit+1)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    seed: int
    limit: int = 0

    def data(self) -> np.ndarray:
        r, dtype = np.random.default_rng(self.seed), numpy_dtype(self.dtype)
        if dtype == np.bool_:
            return r.random(self.shape) < 0.5
        if self.kind == "index":
            return r.integers(-2 if dtype.kind == "i" else 0, self.limit + 2, self.shape).astype(dtype)
        if dtype.kind in "iu" and self.kind == "wide":
            info = np.iinfo(dtype)
            x = r.integers(info.min, info.max, self.shape, dtype, endpoint=True)
            return np.where(
                r.random(self.shape) < 0.1, r.choice([info.min, info.max, 0, 1], self.shape).astype(dtype), x
            )
        if dtype.kind in "iu" or self.kind == "small":
            return r.integers(-4 if dtype.kind != "u" else 0, 5, self.shape).astype(np.int32).astype(dtype)
        x = r.standard_normal(self.shape, np.float32)
        if self.kind == "special":
            x = np.where(r.random(self.shape) < 0.2, r.choice(SPECIAL, self.shape), x)
        with np.errstate(over="ignore"):
            return x.astype(dtype)


@dataclass(frozen=True)
class Line:
    """`name = text`. `exact`: every correct implementation gives the same bits."""

    name: str
    text: str
    exact: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """`transform`: "" | "vmap" | "grad" | "donate" (the first operand). `outputs` name lines or operands."""

    seed: int
    operands: tuple[Operand, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    transform: str = ""

    def function(self) -> Callable[..., Any]:
        """The function of the operands' arrays; its lines are compiled from their text."""
        code = [compile(x.text, f"<fuzz seed {self.seed}: {x.name}>", "eval") for x in self.lines]
        names = [o.name for o in self.operands]

        def plain(*args: Any) -> tuple[Any, ...]:
            scope = {**NAMES, **dict(zip(names, args, strict=True))}
            for x, c in zip(self.lines, code, strict=True):
                scope[x.name] = eval(c, scope)
            return tuple(scope[o] for o in self.outputs)

        if self.transform == "vmap":
            return jax.vmap(plain)
        if self.transform == "grad":
            floats = tuple(n for n, o in enumerate(self.operands) if o.dtype in FLOATS)

            def total(*args: Any) -> Any:
                out = [y for y in plain(*args) if jnp.issubdtype(y.dtype, jnp.floating)]
                return sum(jnp.sum(y.astype(jnp.float32) * 0.5) for y in out)

            return jax.grad(total, argnums=floats)
        return plain

    def data(self) -> list[np.ndarray]:
        if self.transform != "vmap":
            return [o.data() for o in self.operands]
        return [np.stack([replace(o, seed=o.seed + 7919 * n).data() for n in range(3)]) for o in self.operands]

    def exact(self) -> list[bool]:
        """Per output of the plain function, whether its bits are determined."""
        known = {x.name: x.exact for x in self.lines} | {o.name: True for o in self.operands}
        return [known[o] and self.transform != "grad" for o in self.outputs]

    def source(self) -> str:
        """The function as a script that a person can run."""
        args = ", ".join(o.name for o in self.operands)
        lines = [f"# seed {self.seed}{', ' + self.transform if self.transform else ''}"]
        lines += [f"# {o.name}: {o.dtype}{list(o.shape)} {o.kind}" for o in self.operands]
        lines += [f"def f({args}):"]
        lines += [f"    {x.name} = {x.text}  # {x.dtype}{list(x.shape)}" for x in self.lines]
        return "\n".join([*lines, f"    return {', '.join(self.outputs)},"])


def names(text: str) -> list[str]:
    """The variables of a line."""
    return re.findall(r"\b[av]\d+\b", text)


def tidy(case: Case) -> Case:
    """Without lines and operands that no output needs."""
    wanted, lines = set(case.outputs), []
    for x in reversed(case.lines):
        if x.name in wanted:
            lines.append(x)
            wanted |= set(names(x.text))
    return replace(case, lines=tuple(lines[::-1]), operands=tuple(o for o in case.operands if o.name in wanted))


def _attend(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """Grouped attention [B, T, H, D] over [B, S, G, D]; `mask` broadcasts to [B, G, N, T, S]."""
    b, t, h, d = q.shape
    g = k.shape[2]
    s = jnp.einsum("btgnd,bsgd->bgnts", q.reshape(b, t, g, h // g, d), k).astype(jnp.float32) * scale
    if mask is not None:
        s = jnp.where(mask, s, -1e30)
    return jnp.einsum("bgnts,bsgd->btgnd", jax.nn.softmax(s, -1).astype(v.dtype), v).reshape(b, t, h, -1)


def _scan(f: Callable[..., Any], init: Any, xs: Any, reverse: bool = False) -> Any:
    """The stacked results of a scan whose results are its carries."""
    return lax.scan(lambda c, x: (f(c, x),) * 2, init, xs, reverse=reverse)[1]


def _normal(x: Any) -> Any:
    """`x` with zeros for denormals, which XLA's CPU threads take for zeros here and there, and we do not: what follows may
    make any difference of it (a root, a test for zero)."""
    return jnp.where(jnp.abs(x) < 2.0**-126, 0, x)


NAMES: dict[str, Any] = {
    "jax": jax,
    "jnp": jnp,
    "lax": lax,
    "np": np,
    "attend": _attend,
    "normal": _normal,
    "scan": _scan,
}
"""What the lines may use besides variables."""
