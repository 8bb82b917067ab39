"""Decode steps in many spellings against ``jax.jit``: ``python -m benchmarks.spellings --model llama-3.2-1b --batch 1,8``.

The same decoder in plain jnp (`benchmarks.decoders`) with its weights and caches kept in different ways. Every layout is a row:
loops of steps inside one ``jax.jit`` take turns with the same loops as megakernels. The gate is the error of one step's
logits against float32, over that of ``jax.jit``. A model counts by its worst row.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.table import Table

from benchmarks import bandwidth, machine, output, timing
from benchmarks.decoders import LAYOUTS, Shape, laid_out, on_device
from jax_mpk import megakernelize

SHAPES = {
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936, qk_norm=True),
    "qwen3-1.7b": Shape(28, 2048, 16, 8, 128, 6144, 151936, qk_norm=True),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True),
    "tiny": Shape(2, 128, 4, 2, 32, 256, 512),
}
GATE = 1.25
"""How much larger than that of ``jax.jit`` the error may be."""


def loop_of(step: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """``steps`` greedy steps: ``loop(weights, tokens, cache, pos) -> (tokens, cache)``."""

    def loop(w: Any, tokens: jax.Array, held: Any, pos: jax.Array) -> Any:
        def body(_: jax.Array, carry: tuple) -> tuple:
            tokens, held, pos = carry
            tokens, _, held = step(w, tokens, held, pos)
            return tokens, held, pos + 1

        return lax.fori_loop(0, steps, body, (tokens, held, pos))[:2]

    return loop


class Contestant:
    """A compiled loop; its cache goes round."""

    def __init__(self, step: Callable[..., Any], steps: int, args: tuple):
        self.w, self.tokens, held, self.pos = args
        self.held = jax.tree.map(jnp.copy, held)
        self.loop = (
            jax.jit(loop_of(step, steps), donate_argnums=2).lower(self.w, self.tokens, self.held, self.pos).compile()
        )

    def __call__(self) -> None:
        _, self.held = jax.block_until_ready(self.loop(self.w, self.tokens, self.held, self.pos))


def traffic(shape: Shape, batch: int, cached: float, itemsize: int = 2) -> int:
    """Bytes that a step cannot avoid to read: every weight once (the embedding is the head), and the cache so far."""
    heads = shape.heads * shape.head + 2 * shape.kv_heads * shape.head
    layer = shape.width * (heads + shape.heads * shape.head + 3 * shape.hidden)
    return itemsize * int(shape.layers * layer + shape.vocab * shape.width
                          + 2 * shape.layers * batch * shape.kv_heads * shape.head * cached)  # fmt: skip


def error(step: Callable[..., Any], args: tuple, reference: np.ndarray) -> float:
    """Root mean square error of the logits of one step."""
    logits = np.asarray(jax.jit(lambda *a: step(*a)[1])(*args), np.float64)
    return float(np.sqrt(np.mean((logits - reference) ** 2)))


def row(name: str, layout: str, batch: int, a: argparse.Namespace) -> dict[str, Any]:
    """One layout of one model."""
    shape = replace(SHAPES[name], slots=a.context)
    pos = a.context - a.steps
    step, args = laid_out(shape, batch, jnp.bfloat16, LAYOUTS[layout], pos, on_device(0))
    wrapped = megakernelize(step, implementation=a.implementation)
    out: dict[str, Any] = {"model": name, "layout": layout, "batch": batch, "context": a.context}
    try:
        runs = {"jit": Contestant(step, a.steps, args), "ours": Contestant(wrapped, a.steps, args)}
        seconds = timing.interleave(runs, a.repeats)
        del runs
        ms = {k: timing.summary([1e3 * s / a.steps for s in v]) for k, v in seconds.items()}
        total = traffic(shape, batch, pos + (a.steps - 1) / 2)
        rate = bandwidth.read_only(jax.devices()[0].platform, min(max(total, 256 << 20), 1 << 30), a.threads).rate
        out |= {"ms": ms, "ratio": timing.ratios(seconds["jit"], seconds["ours"]), "bytes": total, "read_only": rate,
                "share": {k: total / (1e-3 * v["median"]) / rate for k, v in ms.items()}}  # fmt: skip
        if a.gate:
            wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args)
            with jax.default_matmul_precision("highest"):
                exact = np.asarray(jax.jit(lambda *x: step(*x)[1])(*wide), np.float64)
            del wide
            out["gate"] = error(wrapped, args, exact) / error(step, args, exact)
    except Exception as e:
        out["error"] = f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}"
    gc.collect()
    return out


def table(rows: Sequence[dict[str, Any]], a: argparse.Namespace) -> Table:
    drawn = Table(title=f"decode by spelling, {a.implementation}, context {a.context}, {jax.devices()[0].device_kind}")
    for head in ("model", "batch", "layout", "jit ms", "ours ms", "ratio", "% of read", "gate"):
        drawn.add_column(head, justify="left" if head in ("model", "layout") else "right", no_wrap=True)
    for r in rows:
        if "error" in r:
            drawn.add_row(r["model"], str(r["batch"]), r["layout"], "", "", "", "", r["error"])
            continue
        gate = f"{r['gate']:.2f}{'' if r['gate'] <= GATE else ' FAILED'}" if "gate" in r else "-"
        drawn.add_row(r["model"], str(r["batch"]), r["layout"], output.spread(r["ms"]["jit"], 3), output.spread(r["ms"]["ours"], 3),
                      output.spread(r["ratio"], 2), f"{100 * r['share']['jit']:.0f} -> {100 * r['share']['ours']:.0f}", gate)  # fmt: skip
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spellings", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="llama-3.2-1b", help="comma list of " + ", ".join(SHAPES))
    add("--batch", default="1", type=output.integers, help="comma list")
    add("--layout", default=",".join(LAYOUTS), help="comma list")
    add("--implementation", default="cuda")
    add("--context", default=1000, type=int)
    add("--steps", default=32, type=int)
    add("--repeats", default=5, type=int)
    add("--threads", default=0, type=int)
    add("--no-gate", dest="gate", action="store_false")
    add("--json", help="file for everything that was measured")
    a = parser.parse_args(argv)
    rows = []
    for name in a.model.split(","):
        for batch in a.batch:
            for layout in a.layout.split(","):
                rows.append(row(name, layout, batch, a))
                output.console().print(table(rows[-1:], a))
    output.console().print(table(rows, a))
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"machine": machine.describe(), "arguments": vars(a), "rows": rows}, f, indent=1)
    return int(any("error" in r or r.get("gate", 0) > GATE for r in rows))


if __name__ == "__main__":
    sys.exit(main())
