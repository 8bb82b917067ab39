"""How fast this machine reads memory and does nothing else: the denominator of every share of bandwidth."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

PASSES = 3
"""Measurements of which the best counts: whatever else the machine does can only make a stream slower."""


class Bandwidth(NamedTuple):
    """A measured read-only stream: bytes per second, and by what it was read."""

    rate: float
    method: str


def read_only(platform: str, nbytes: int, threads: int) -> Bandwidth:
    """The read-only stream of a JAX platform.

    Args:
      platform: "cpu" or "gpu".
      nbytes: bytes to read in a pass; take about as many as the benchmarked function reads.
      threads: CPU threads that read.
    """
    try:
        from jax_mpk import _ext
    except ImportError:
        _ext = None
    if platform == "cpu" and hasattr(_ext, "read_bandwidth"):
        rate = max(_ext.read_bandwidth(nbytes, threads) for _ in range(PASSES))
        return Bandwidth(float(rate), f"read stream, {threads} threads")
    if platform == "gpu" and hasattr(_ext, "cuda_read_bandwidth"):
        from jax_mpk.backends.cuda import backend as cuda

        return Bandwidth(cuda.read_bandwidth(nbytes), "read stream")
    return Bandwidth(by_reduction(nbytes), "jnp.sum, a stand-in that may be slower than a read stream")


def by_reduction(nbytes: int, calls: int = 4) -> float:
    """Bytes per second of an XLA reduction over a large array; a lower bound of what the memory can do."""
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    x = jnp.ones((max(1, nbytes // (4 * 16384)), 16384), jnp.int32)
    total(x).block_until_ready()
    best = 0.0
    for _ in range(PASSES):
        start = time.perf_counter()
        jax.block_until_ready([total(x) for _ in range(calls)])
        best = max(best, calls * x.nbytes / (time.perf_counter() - start))
    return best
