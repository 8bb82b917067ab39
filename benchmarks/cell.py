"""One cell of the decode benchmark: one model at one batch and context, ``jax.jit`` against a candidate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bandwidth, gate, timing
from benchmarks.subject import Subject, Wrapper, plain, start, upcast
from benchmarks.traffic import step_traffic

STREAM = 256 << 20, 1 << 30
"""Fewest and most bytes that the bandwidth is measured with."""

Tick = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How to measure. ``gate_steps``: 0 for no gate, None for as many as the model's size allows."""

    implementation: str
    steps: int
    repeats: int
    threads: int
    gate_steps: int | None = None


class Contestant:
    """A compiled loop over the last ``steps`` positions, from the same token every time.

    Its cache goes round: a run overwrites the positions that the one before wrote, and never attends to later ones.
    """

    def __init__(self, made: Subject, wrap: Wrapper, batch: int, context: int, steps: int):
        self.token, self.cache = jax.block_until_ready(start(made.model, batch, context))
        self.leaves, self.pos = made.leaves, np.int32(context - steps)
        clock = time.perf_counter()
        self.loop = made.compile_loop(wrap, steps, self.token, self.cache)
        self.compile_s = time.perf_counter() - clock
        self.final = self.token

    def __call__(self) -> None:
        self.final, self.cache, _ = jax.block_until_ready(self.loop(self.leaves, self.token, self.cache, self.pos))


def measure(
    name: str, made: Subject, wrap: Wrapper, plan: Plan, batch: int, context: int, tick: Tick
) -> dict[str, Any]:
    """Both loops in turn, the bandwidth before and after, and the gate.

    Whatever stops the candidate becomes the ``error`` of the cell; ``jax.jit`` is measured all the same.
    """
    steps = min(plan.steps, context)
    platform = jax.devices()[0].platform
    traffic = step_traffic(made.model, batch, context - steps + (steps - 1) / 2)
    cell: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "context": context,
        "dtype": jnp.dtype(made.model.dtype).name,
        "implementation": plan.implementation,
        "parameters": made.model.config.num_parameters,
        "steps": steps,
        "repeats": plan.repeats,
        "bytes": {"weights": traffic.weights, "kv": traffic.kv, "total": traffic.total},
        "bandwidth": None,
        "jit": None,
        "candidate": None,
        "ratio": None,
        "gate": None,
        "error": None,
    }

    tick("compiling jax.jit")
    jit = Contestant(made, plain, batch, context, steps)
    tick("compiling the candidate")
    candidate = _attempt(cell, lambda: Contestant(made, wrap, batch, context, steps))

    size = min(max(traffic.total, STREAM[0]), STREAM[1])
    before = bandwidth.read_only(platform, size, plan.threads)
    seconds = None
    if candidate:
        seconds = _attempt(cell, lambda: _timed({"jit": jit, "candidate": candidate}, plan.repeats, platform, tick))
    if not seconds:
        candidate, seconds = None, _timed({"jit": jit}, plan.repeats, platform, tick)
    after = bandwidth.read_only(platform, size, plan.threads)
    cell["bandwidth"] = {"before": before.rate, "after": after.rate, "method": before.method, "bytes": size}

    rate = max(before.rate, after.rate)
    cell["jit"] = _speed(seconds["jit"], jit, batch, steps, traffic.total, rate)
    if candidate is None:
        return cell
    cell["candidate"] = _speed(seconds["candidate"], candidate, batch, steps, traffic.total, rate)
    cell["ratio"] = timing.ratios(seconds["jit"], seconds["candidate"])

    final = np.asarray(candidate.final)
    jit.cache = candidate.cache = None  # the gate has caches of its own
    if plan.gate_steps != 0:
        cell["gate"] = _attempt(cell, lambda: _gated(made, wrap, plan, batch, context, steps, final, tick))
    return cell


def _attempt(cell: dict[str, Any], what: Callable[[], T]) -> T | None:
    """What ``what`` returns, or None with the reason in the cell: one candidate that fails must not end the others."""
    try:
        return what()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        cell["error"] = f"{type(error).__name__}: {lines[0][:400]}"
        return None


def _timed(runs: dict[str, Contestant], repeats: int, platform: str, tick: Tick) -> dict[str, list[float]]:
    seconds = timing.interleave(runs, repeats, lambda: tick("timing"))
    if platform == "gpu" and "jax_mpk.backends.cuda" in sys.modules:
        sys.modules["jax_mpk.backends.cuda"].check()  # raises for a launch that gave up
    return seconds


def _speed(seconds: list[float], run: Contestant, batch: int, steps: int, nbytes: int, rate: float) -> dict[str, Any]:
    stats = timing.summary([1e3 * s / steps for s in seconds])
    per_second = 1e3 / stats["median"]
    return {
        "ms_per_step": stats,
        "tokens_per_s": batch * per_second,
        "bytes_per_s": nbytes * per_second,
        "share": nbytes * per_second / rate,
        "compile_s": run.compile_s,
    }


def _gated(
    made: Subject, wrap: Wrapper, plan: Plan, batch: int, context: int, steps: int, final: np.ndarray, tick: Tick
) -> dict[str, Any]:
    """The gate, and the timed loop against its steps."""
    host = _reference_device(made)
    count = min(plan.gate_steps or _affordable_steps(made, host), context)
    reference = upcast(made.model, host)
    found = gate.check(made, wrap, reference, batch=batch, slots=context, steps=count, tick=lambda: tick("gate"))
    tick("the loop against its steps")
    gate.check_loop(found, made, wrap, slots=context, steps=steps, final=final)
    return found.as_dict() | {"text": str(found)}


def _affordable_steps(made: Subject, host: jax.Device | None) -> int:
    """64, fewer where a CPU runs a large model."""
    size = made.model.config.num_parameters
    if (jax.devices()[0].platform != "cpu" and host is None) or size < 3e8:
        return 64
    return 16 if size < 1e9 else 4


def _reference_device(made: Subject) -> jax.Device | None:
    """The host where the float32 weights do not fit beside the others on the accelerator, else None."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)
    return jax.devices("cpu")[0] if 4.4 * made.model.config.num_parameters > free else None
