"""Where the time of one step goes: ``python -m benchmarks.timeline --model llama-3.2-1b --batch 1,8 [--out DIRECTORY]``.

The profile (`jax_mpk.inspect.profile`) of the zoo's greedy step. Operators of one kind and shape (the same one in every
layer) share a row: how long the device was at it, and per task what the time went to. "wait" is since the worker's task
before; "hop" since the end of the last task that this one needed, where the worker waited for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import output
from benchmarks.decode import DTYPES
from benchmarks.subject import start, subject
from jax_mpk import Options, megakernelize
from jax_mpk.inspect.profile import Profile
from models import registry


def profile(name: str, batch: int, context: int, dtype: Any, implementation: str, knobs: dict[str, Any]) -> Profile:
    """The profile of one step of a model of the zoo."""
    model, _ = registry.load(name, dtype=dtype, seed=0)
    made = subject(model)
    token, cache = start(model, batch, context)
    args = (jax.tree.unflatten(made.treedef, made.leaves), token, cache, np.int32(context - 1))
    found: Profile = megakernelize(
        made.step, implementation=implementation, options=Options(cache_dir="", **knobs)
    ).profile(*args)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="llama-3.2-1b", help="comma list")
    add("--batch", default="1", type=output.integers, help="comma list")
    add("--context", default=1000, type=int)
    add("--dtype", default="bf16", choices=DTYPES)
    add("--implementation", default="cuda")
    add("--out", type=Path, help="directory for a Perfetto trace and an SVG of each")
    add("--window", type=int, help="copies in flight")
    args = parser.parse_args(argv)
    knobs = {"window": args.window} if args.window else {}
    for name in args.model.split(","):
        for batch in args.batch:
            found = profile(name, batch, args.context, DTYPES[args.dtype], args.implementation, knobs)
            print(f"{name}, batch {batch}: {found}\n")
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                found.trace(args.out / f"{name}-{batch}.json")
                found.svg(args.out / f"{name}-{batch}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
