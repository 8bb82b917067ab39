"""Decode speed against ``jax.jit``: ``python -m benchmarks.decode --model qwen3-130m --implementation cpu``.

Every row of the table is one model at one batch and context. The zoo's own ``greedy_step`` is looped inside one
``jax.jit`` (weights as operands, cache donated), once as it is and once wrapped, and the two take turns in one process.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine, output
from benchmarks.cell import Plan, measure
from benchmarks.subject import Wrapper, choose, subject
from models import registry

DTYPES = {"bf16": jnp.bfloat16, "bfloat16": jnp.bfloat16, "f32": jnp.float32, "float32": jnp.float32}
COLUMNS = "batch", "context", "dtype", "jax.jit ms/step", "ours ms/step", "tokens/s", "ratio", "MB/step", "% of read"


def run(args: argparse.Namespace, wrap: Wrapper) -> dict[str, Any]:
    """All cells, as the document that ``--json`` writes."""
    plan = Plan(args.implementation, args.steps, args.repeats, args.threads, args.gate_steps if args.gate else 0)
    document: dict[str, Any] = {"machine": machine.describe(), "arguments": vars(args), "cells": []}
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for name in args.model:
            task = bar.add_task(f"{name}: weights, MB")

            def loaded(done: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=done // 10**6, total=total // 10**6)

            model, _ = registry.load(name, dtype=DTYPES[args.dtype], seed=0, progress=loaded)
            made = subject(model)
            bar.remove_task(task)
            for batch in args.batch:
                for context in args.context:
                    task = bar.add_task(name, total=None)

                    def tick(what: str, task: Any = task, at: str = f"{name}, {batch} x {context}") -> None:
                        bar.update(task, description=f"{at}: {what}", advance=1)

                    document["cells"].append(measure(name, made, wrap, plan, batch, context, tick))
                    bar.remove_task(task)
                    gc.collect()
            del model, made
    return document


def table(document: dict[str, Any]) -> Table:
    """The cells, one row each."""
    title = f"decode, {document['arguments']['implementation']} against jax.jit, {document['machine']['device']}"
    drawn = Table(title=title, caption=caption(document), caption_justify="left")
    drawn.add_column("model", no_wrap=True)
    for name in COLUMNS:
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("gate", min_width=24)
    for c in document["cells"]:
        ours, jit = c["candidate"], c["jit"]
        drawn.add_row(
            c["model"],
            str(c["batch"]),
            str(c["context"]),
            c["dtype"],
            output.spread(jit["ms_per_step"]),
            output.spread(ours["ms_per_step"]) if ours else "-",
            f"{ours['tokens_per_s']:,.1f}" if ours else "-",
            output.spread(c["ratio"], 2) if ours else "-",
            f"{c['bytes']['total'] / 1e6:,.1f}",
            f"{100 * jit['share']:.0f} -> {100 * ours['share']:.0f}" if ours else f"{100 * jit['share']:.0f}",
            verdict(c),
        )
    return drawn


def verdict(cell: dict[str, Any]) -> str:
    """The gate of a cell, why it did not pass, or why there is none."""
    if cell["error"]:
        return cell["error"]
    if cell["gate"] is None:
        return "not run"
    return "; ".join([cell["gate"]["text"], *cell["gate"]["failures"]])


def caption(document: dict[str, Any]) -> str:
    """How to read the table."""
    cells, arguments, about = document["cells"], document["arguments"], document["machine"]
    rates = [f"{c['bandwidth']['before'] / 1e9:.1f}/{c['bandwidth']['after'] / 1e9:.1f}" for c in cells]
    return (
        f"median (min..max) of {arguments['repeats']} interleaved loops of up to {arguments['steps']} steps; "
        f"jax {about['packages']['jax']}, commit {about['commit']}, {about['date']}\n"
        f"read-only GB/s before/after ({cells[0]['bandwidth']['method']}): {', '.join(rates)}\n"
        "gate: rms error of logits against float32 over that of jax.jit; decisive tokens equal to float32's / decisive "
        "tokens, and tokens in all"
    )


def ok(cell: dict[str, Any]) -> bool:
    """Whether a cell counts."""
    return cell["error"] is None and (cell["gate"] is None or cell["gate"]["passed"])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Decode speed against jax.jit.")
    add = parser.add_argument
    add("--model", default="qwen3-130m", help=f"comma list of {', '.join(registry.PRESETS)}; random weights")
    add("--batch", default="1", type=output.integers, help="comma list")
    add("--context", default="1024", type=output.integers, help="comma list; slots of the cache, full at the end")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--implementation", default="cpu", choices=["cpu", "cuda", "xla", "jit"], help="what runs against jax.jit")
    add("--steps", type=int, help="steps of a loop (64; 16 on a CPU)")
    add("--repeats", type=int, default=5, help="loops of each")
    add("--threads", type=int, default=machine.threads(), help="CPU threads that measure the bandwidth")
    add("--gate", action=argparse.BooleanOptionalAction, default=True, help="compare with float32")
    add("--gate-steps", type=int, help="steps of the gate (64; fewer for large models on a CPU)")
    add("--json", metavar="FILE", help="write everything that was measured")
    args = parser.parse_args(argv)
    args.model = args.model.split(",")
    for name in args.model:
        if name not in registry.PRESETS:
            parser.error(f"no model is called '{name}'; there are {', '.join(registry.PRESETS)}")
        longest = registry.PRESETS[name][1]().max_len
        if max(args.context) > longest:
            parser.error(f"{name} has a context of {longest}, not {max(args.context)}")
    if args.steps is None:
        args.steps = 64 if args.implementation == "cuda" else 16
    if min(args.steps, args.repeats, args.threads, 1 if args.gate_steps is None else args.gate_steps) < 1:
        parser.error("--steps, --repeats, --threads and --gate-steps must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the status is 1 where a cell has an error or its gate does not pass."""
    args = parse(argv)
    if args.implementation == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if args.implementation == "cuda" and jax.default_backend() != "gpu":
        print("error: --implementation cuda needs a GPU that JAX can use", file=sys.stderr)
        return 1
    try:
        wrap = choose(args.implementation)
    except ImportError as error:
        print(f"error: --implementation {args.implementation} needs jax_mpk: {error}", file=sys.stderr)
        return 1
    document = run(args, wrap)
    output.console().print(table(document))
    if args.json:
        output.write_json(args.json, document)
    return 0 if all(map(ok, document["cells"])) else 1


if __name__ == "__main__":
    sys.exit(main())
