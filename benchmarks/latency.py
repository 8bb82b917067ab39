"""Latency of small functions against ``jax.jit``, alone and beside other processes: ``python -m benchmarks.latency``.

Median and 99th percentile of single calls, in microseconds. Contestants take turns of ``--turn`` seconds, each after a
pause (see ``timing``). ``--busy N`` runs N processes that only compute, on the same processors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.timing import SETTLE
from jax_mpk import megakernelize

Function = Callable[..., Any]


def _normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, np.float32) / 8, dtype)


def _ints(high: int, *shape: int, dtype: Any = np.int32) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(sum(shape)).integers(-high if dtype != np.uint8 else 0, high, shape).astype(dtype)
    )


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot(x, w, preferred_element_type=jnp.int32)


def two(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Two operators, the second on all that the first computes."""
    return jnp.tanh(x @ w) @ v


def decode(x: jax.Array, layers: list[dict[str, jax.Array]]) -> jax.Array:
    """A decoder step without its attention: norm, gate and up, down, residual."""
    for p in layers:
        h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return x


def _layers(n: int, width: int, hidden: int) -> list[dict[str, jax.Array]]:
    one = {"gate": _normal(width, hidden), "up": _normal(width, hidden), "down": _normal(hidden, width)}
    return [one] * n


CASES: dict[str, Callable[[], tuple[Function, tuple[Any, ...]]]] = {
    "two operators": lambda: (two, (_normal(1, 256), _normal(256, 512), _normal(512, 256))),
    "decode, 8 layers": lambda: (decode, (_normal(1, 256), _layers(8, 256, 512))),
    "int8 matmul, 512": lambda: (_dot, (_ints(127, 512, 512, dtype=np.int8), _ints(127, 512, 512, dtype=np.int8))),
    "int8 matmul, 2048": lambda: (_dot, (_ints(127, 2048, 2048, dtype=np.int8), _ints(127, 2048, 2048, dtype=np.int8))),
    "int8 matvec, 2048": lambda: (_dot, (_ints(127, 1, 2048, dtype=np.int8), _ints(127, 2048, 2048, dtype=np.int8))),
    "int8 matvec, transposed": lambda: (lambda x, w: _dot(x, w.T), (_ints(127, 1, 2048, dtype=np.int8), _ints(127, 2048, 2048, dtype=np.int8))),
    "int32 matmul, 512": lambda: (_dot, (_ints(1 << 30, 512, 512), _ints(1 << 30, 512, 512))),
    "uint8 matmul, 64 rows": lambda: (_dot, (_ints(255, 64, 2048, dtype=np.uint8), _ints(255, 2048, 512, dtype=np.uint8))),
    "scatter add, rows": lambda: (lambda x, i, y: x.at[i].add(y), (_normal(1000, 64), abs(_ints(1000, 5000)), _normal(5000, 64))),
    "scatter add, elements": lambda: (lambda x, i, y: x.at[i].add(y), (_normal(1000), abs(_ints(1000, 50000)), _normal(50000))),
    "scatter set, rows": lambda: (lambda x, i, y: x.at[i].set(y), (_normal(1000, 64), abs(_ints(1000, 5000)), _normal(5000, 64))),
    "histogram": lambda: (lambda x: jnp.zeros(256, jnp.int32).at[x].add(1), (abs(_ints(255, 100000)),)),
}  # fmt: skip


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """That many processes that compute and do nothing else."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(processes)]
    for p in others:
        p.start()
    try:
        time.sleep(1 if processes else 0)
        yield
    finally:
        for p in others:
            p.terminate()


def _spin() -> None:
    while True:
        pass


def measure(runs: dict[str, Callable[[], Any]], turn: float, turns: int) -> dict[str, list[float]]:
    """Seconds of single calls."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    names = list(runs)
    for t in range(turns):
        for name in names[t % len(names) :] + names[: t % len(names)]:
            time.sleep(SETTLE)
            runs[name]()
            end = time.perf_counter() + turn
            while time.perf_counter() < end:
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    at = lambda q: 1e6 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {
        "n": len(ordered),
        "median": 1e6 * statistics.median(ordered),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": at(1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--turn", type=float, default=0.5)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0, help="of ours; 0 = one per core")
    parser.add_argument(
        "--wide-first", type=int, default=0, help="one launch with that many threads before anything is timed"
    )
    parser.add_argument("--json", help="a file for the figures")
    args = parser.parse_args(arguments)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {args.busy} busy processes")
    print(
        f"{'microseconds':26}{'jit median':>12}{'p99':>10}{'ours median':>14}{'p99':>10}{'median':>9}{'p99':>7}  (ratios)"
    )
    document: dict[str, Any] = {"machine": machine.describe(), "arguments": vars(args), "cases": {}}
    for name in args.case or CASES:
        fn, operands = CASES[name]()
        options = {"threads": args.threads, "cache_dir": ""}
        made = {"jit": jax.jit(fn), "ours": jax.jit(megakernelize(fn, implementation="cpu", options=options))}
        for x, y in zip(*(jax.tree.leaves(f(*operands)) for f in made.values()), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
        if args.wide_first:
            wide = megakernelize(fn, implementation="cpu", options=options | {"threads": args.wide_first})
            jax.block_until_ready(jax.jit(wide)(*operands))
        runs = {k: lambda f=f: jax.block_until_ready(f(*operands)) for k, f in made.items()}
        with busy(args.busy):
            found = {k: percentiles(v) for k, v in measure(runs, args.turn, args.turns).items()}
        jit, ours = found["jit"], found["ours"]
        print(f"{name:26}{jit['median']:12.1f}{jit['p99']:10.1f}{ours['median']:14.1f}{ours['p99']:10.1f}"
              f"{ours['median'] / jit['median']:9.2f}{ours['p99'] / jit['p99']:7.2f}", flush=True)  # fmt: skip
        document["cases"][name] = found
    if args.json:
        with open(args.json, "w") as file:
            json.dump(document, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
