"""Helpers of the frontend's tests: the interpreted graph of a function against `jax.jit` of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mpk.frontend import lower
from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Graph, check

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def graph_of(f: Callable[..., Any], *args: Any) -> Graph:
    """The checked graph of `f` at these arguments; its text must print."""
    g = check(lower(jax.make_jaxpr(f)(*args)))
    text = str(g)
    assert text.startswith("graph fn(") and text.splitlines()[-1].startswith("  return ")
    return g


def as_numpy(x: Any) -> np.ndarray:
    """The array as operands are: words for keys."""
    x = jnp.asarray(x)
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def run_graph(g: Graph, *args: Any) -> list[np.ndarray]:
    """The results; the arguments must be left alone, and results must be values of their own."""
    flat = [as_numpy(x) for x in jax.tree.leaves(args)]
    before = [x.copy() for x in flat]
    assert len(set(g.results)) == len(g.results)
    assert all(g.values[r].role == "temp" for r in g.results)
    out = interpret.run(g, flat)
    for x, y in zip(flat, before, strict=True):
        assert x.tobytes() == y.tobytes()
    return out


def close(have: np.ndarray, want: Any, ulps: float = 8, name: str = "", sums: bool = False) -> None:
    """Equal for integers; for floats within `ulps` of the element and of a hundredth of the largest one.

    `sums`: of the largest one itself, where the terms of a sum may cancel.
    """
    want = as_numpy(want)
    assert have.dtype == want.dtype and have.shape == want.shape
    if have.dtype.name not in EPS:
        np.testing.assert_array_equal(have, want, name)
        return
    have, want, eps = have.astype(np.float64), want.astype(np.float64), EPS[have.dtype.name] * ulps
    finite = want[np.isfinite(want)]
    atol = eps * (np.abs(finite).max() if finite.size else 0) * (1 if sums else 0.01)
    np.testing.assert_allclose(have, want, rtol=eps, atol=atol, err_msg=name)


def same(f: Callable[..., Any], *args: Any, ulps: float = 8, eager: bool = False,
         sums: bool = False) -> Graph:  # fmt: skip
    """Asserts that the graph of `f` gives what `jax.jit(f)` gives (`eager`: op by op, where jit skips roundings)."""
    g = graph_of(f, *args)
    have = run_graph(g, *args)
    want = jax.tree.leaves(f(*args) if eager else jax.jit(f)(*args))
    assert len(have) == len(want)
    for n, (x, y) in enumerate(zip(have, want, strict=True)):
        close(x, y, ulps, f"result {n}", sums)
    return g


def normal(shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0, scale: float = 1.0) -> jax.Array:
    """Normal numbers, of a fixed seed."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * scale, dtype)


def integers(shape: tuple[int, ...], low: int, high: int, dtype: Any = jnp.int32, seed: int = 0) -> jax.Array:
    """Integers `low <= x < high`, of a fixed seed."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).integers(low, high, size=shape), dtype)
