"""Compile time of decode steps: ``python -m benchmarks.compile --model qwen3-8b --layers 4,8,16,32``.

Only shapes are compiled (no weight is made), so a model of any size can be measured on any machine. Every column is one
number of layers, the last one the model's own; every row is one pass. No cache is used but in the row that says so.
"""

from __future__ import annotations

import argparse
import gc
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from benchmarks import machine, output
from benchmarks.decode import DTYPES
from models import registry
from models.common.cache import init_cache
from models.common.initialize import abstract_model
from models.decode import greedy_step


def abstract_step(name: str, layers: int | None, batch: int, context: int, dtype: Any) -> tuple[Callable, tuple]:
    """The decode step of a preset, with another number of layers if given, and its arguments as shapes."""
    kind, config = registry.preset(name, **({"num_layers": layers} if layers else {}))
    graphdef, state = nnx.split(abstract_model(kind, config, dtype))
    cache = jax.eval_shape(lambda: init_cache(config, batch, context, dtype))
    token, pos = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return partial(greedy_step, graphdef), (state, token, cache, pos)


def profile(name: str, layers: int | None, batch: int, context: int, dtype: Any, platform: str) -> dict[str, Any]:
    """Seconds of every stage for one case, and the size of what came out. Raises what compiling raises."""
    from jax_mpk import Options, backends, compiler, megakernelize

    step, shapes = abstract_step(name, layers, batch, context, dtype)
    uncached = Options(cache_dir="", cache_entries=0)
    compiler.clear_cache()
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    lowered = megakernelize(step, implementation=platform, options=uncached).lower(*shapes)
    seconds = time.perf_counter() - clock
    passes = lowered.compile_times
    stages = {"trace": seconds - sum(passes.values()), **passes}
    if platform == "cuda":
        backend = backends.get("cuda")
        clock = time.perf_counter()
        backend.build(lowered.program, backend.device(uncached))
        stages["device code"] = time.perf_counter() - clock
    processor = time.process_time() - processor
    tasks = lowered.tasks()
    return {
        "layers": layers or registry.PRESETS[name][1]().num_layers,
        "seconds": stages,
        "total": sum(stages.values()),
        "processor": processor,
        "cached": cached(lowered, platform),
        "tasks": tasks.tasks,
        "events": tasks.events,
        "grids": len(tasks.grids),
        "program_bytes": len(lowered.program),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def cached(lowered: Any, platform: str) -> float:
    """Seconds to find a program in a disk cache that another process might have written, and its machine code."""
    from jax_mpk import Options, backends, compiler

    compiled = lowered.compiled
    with tempfile.TemporaryDirectory() as directory:
        options = Options(cache_dir=directory)

        def find() -> None:
            blob = compiler.program(compiled.jaxpr, compiled.target, options, name=compiled.name)
            if platform == "cuda":
                backend = backends.get("cuda")
                backend.build(blob, backend.device(options), Path(directory) / "cubin")

        find()
        compiler.clear_cache()
        clock = time.perf_counter()
        find()
        return time.perf_counter() - clock


def growth(cases: Sequence[dict[str, Any]], stage: str | None = None) -> float | None:
    """The exponent with which time grows with layers, from the fewest to the most: 1 is linear."""
    few, many = min(cases, key=lambda c: c["layers"]), max(cases, key=lambda c: c["layers"])
    before, after = (c["seconds"][stage] if stage else c["total"] for c in (few, many))
    if few["layers"] == many["layers"] or min(before, after) <= 0:
        return None
    return math.log(after / before) / math.log(many["layers"] / few["layers"])


def table(name: str, cases: Sequence[dict[str, Any]], document: dict[str, Any]) -> Table:
    """Passes down, layers across."""
    about, arguments = document["machine"], document["arguments"]
    case = f"batch {arguments['batch']}, {arguments['dtype']}, for {arguments['target']}"
    where = f"{about['cpu']['name']}, jax {about['packages']['jax']}, commit {about['commit']}, {about['date']}"
    drawn = Table(title=f"compile, decode step of {name}, {case}", caption_justify="left")
    drawn.caption = f"seconds; growth: time ~ layers^growth\n{where}"
    drawn.add_column("pass")
    for case in cases:
        drawn.add_column(f"{case['layers']} layers", justify="right")
    drawn.add_column("growth", justify="right")

    def row(head: str, values: Sequence[float], exponent: float | None, form: str = "{:.3f}", **style: Any) -> None:
        drawn.add_row(head, *map(form.format, values), "" if exponent is None else f"{exponent:.2f}", **style)

    for stage in cases[0]["seconds"]:
        row(stage, [c["seconds"][stage] for c in cases], growth(cases, stage))
    drawn.add_section()
    row("total", [c["total"] for c in cases], growth(cases), style="bold")
    row("processor time", [c["processor"] for c in cases], None)
    row("found on disk", [c["cached"] for c in cases], None, end_section=True)
    for head in ("tasks", "events", "grids", "program_bytes"):
        row(head.replace("_", " "), [c[head] for c in cases], None, "{:,}")
    return drawn


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every model at every number of layers, as the document that ``--json`` writes."""
    dtype = DTYPES[args.dtype]
    document: dict[str, Any] = {"machine": machine.describe(), "arguments": vars(args), "models": {}}
    profile("qwen3-tiny", None, 1, 64, dtype, args.target)  # imports and first uses are nobody's compile time
    for name in args.model:
        own = registry.PRESETS[name][1]().num_layers
        layers = sorted({n for n in args.layers if n < own} | {own}) if args.layers else [own]
        cases = []
        for n in layers:
            several = [profile(name, n, args.batch, args.context, dtype, args.target) for _ in range(args.repeats)]
            cases.append(min(several, key=lambda case: case["total"]) | {"totals": [case["total"] for case in several]})
        document["models"][name] = cases
    return document


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description="Compile time of decode steps.")
    add = parser.add_argument
    add("--model", default="qwen3-8b", help=f"comma list of {', '.join(registry.PRESETS)}")
    add("--layers", default="4,8,16,32", type=output.integers, help="comma list; the model's own number is added")
    add("--batch", default=1, type=int)
    add("--context", default=1024, type=int, help="slots of the cache")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--target", default="cpu", choices=["cpu", "cuda"], help="cuda includes NVRTC, and needs no GPU")
    add("--repeats", default=1, type=int, help="compiles of each; the fastest is shown")
    add("--json", metavar="FILE", help="write everything that was measured")
    args = parser.parse_args(argv)
    args.model = args.model.split(",")
    for name in args.model:
        if name not in registry.PRESETS:
            parser.error(f"no model is called '{name}'; there are {', '.join(registry.PRESETS)}")
    if min(args.batch, args.context, args.repeats) < 1:
        parser.error("--batch, --context and --repeats must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    args = parse(argv)
    try:
        document = run(args)
    except ImportError as error:
        print(f"error: jax_mpk cannot be imported: {error}", file=sys.stderr)
        return 1
    for name, cases in document["models"].items():
        output.console().print(table(name, cases, document))
    if args.json:
        output.write_json(args.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
