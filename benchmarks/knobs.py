"""What knobs do to the speed of decoding: ``python -m benchmarks.knobs --model llama-3.2-1b window=2 ring=8,window=4``.

The loops of ``benchmarks.decode`` with `jax.jit`, with the defaults and with each set of knobs take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial

import jax
import numpy as np
from rich.table import Table

from benchmarks import bandwidth, output, timing
from benchmarks.cell import Contestant
from benchmarks.decode import DTYPES
from benchmarks.subject import Subject, plain, subject
from benchmarks.traffic import step_traffic
from jax_mpk import megakernelize
from jax_mpk.options import Options, from_environment, variable
from models import registry


def options(text: str) -> Options:
    """ "ring=8,window=4" as the options that these environment variables would make; `ValueError` for an unknown knob."""
    values = dict(pair.split("=", 1) for pair in text.split(","))
    unknown = values.keys() - {f.name for f in fields(Options)}
    if unknown:
        raise ValueError(f"no knob is called {', '.join(sorted(unknown))}: see python -m jax_mpk")
    return from_environment({variable(k): v for k, v in values.items()})


def compare(made: Subject, name: str, batch: int, args: argparse.Namespace) -> Table:
    """One row for every set of knobs."""
    wraps = {"jax.jit": plain, "defaults": partial(megakernelize, implementation="cuda")}
    for text in args.knobs:
        wraps[text] = partial(megakernelize, implementation="cuda", options=options(text))
    with ThreadPoolExecutor(8) as pool:
        jobs = {k: pool.submit(Contestant, made, w, batch, args.context, args.steps) for k, w in wraps.items()}
        runs = {k: job.result() for k, job in jobs.items()}
    seconds = timing.interleave(runs, args.repeats)
    rate = bandwidth.read_only(jax.devices()[0].platform, 1 << 30, 0).rate
    traffic = step_traffic(made.model, batch, args.context - args.steps + (args.steps - 1) / 2).total
    table = Table(title=f"{name}, batch {batch}, context {args.context}")
    table.add_column("knobs", no_wrap=True)
    for head in ("ms/step", "ratio to jit", "% of read", "last tokens"):
        table.add_column(head, justify="right", no_wrap=True)
    own = np.asarray(runs["defaults"].final)
    for k, run in runs.items():
        ms = timing.summary([1e3 * s / args.steps for s in seconds[k]])
        ratio = timing.ratios(seconds["jax.jit"], seconds[k])
        share = 100 * traffic / (ms["median"] * 1e-3) / rate
        same = "as the defaults'" if np.array_equal(np.asarray(run.final), own) else "others"
        table.add_row(k, output.spread(ms), output.spread(ratio, 3), f"{share:.1f}", same)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knobs", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("knobs", nargs="*", help="sets of knobs, each as ring=8,window=4")
    add("--model", default="llama-3.2-1b", help="comma list")
    add("--batch", default="1", type=output.integers, help="comma list")
    add("--context", default=1000, type=int)
    add("--steps", default=64, type=int, help="steps in a loop")
    add("--repeats", default=5, type=int, help="loops")
    add("--dtype", default="bf16", choices=DTYPES)
    args = parser.parse_args(argv)
    for name in args.model.split(","):
        model, _ = registry.load(name, dtype=DTYPES[args.dtype], seed=0)
        made = subject(model)
        for batch in args.batch:
            output.console().print(compare(made, name, batch, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
