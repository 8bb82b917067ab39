"""Whether ``implementation=None`` chooses well: ``python -m benchmarks.choose [--only TEXT] [--calibrate] [--json FILE]``.

Every case of `benchmarks.cases` as plain ``jax.jit``, as ``megakernelize`` chooses, and as the platform's megakernel. They
take turns, each after a pause (see `timing`); the table has medians of calls that end with their results, on a GPU of loops inside
one jit. A function that
XLA gets is the same program as jit's, so its ratio is the noise of the harness. What looks slower than it may be is
measured again, up to ``--again`` times, and all samples count.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from benchmarks import machine, output
from benchmarks.cases import CASES, looped
from benchmarks.timing import SETTLE
from jax_mpk import UnsupportedError, megakernelize

SLOWER, MISSED = 1.05, 1.1
"""What may not be lost, and from where on a gain counts as missed."""


def compiled(fn: Callable[..., Any], operands: Any) -> tuple[Callable[[], Any], bool, str]:
    """A call that blocks, of `fn` compiled for the operands; whether a megakernel is in it; what XLA made of it. Operands
    are flattened once: a call with a tree of weights costs more than a small function."""
    leaves, tree = jax.tree.flatten(operands)
    flat = lambda *xs: fn(*jax.tree.unflatten(tree, xs))
    lowered = jax.jit(flat).lower(*leaves)
    run = lowered.compile()
    text = re.sub(r", metadata=\{[^}]*\}", "", run.as_text() or "").split("\n", 1)[-1].split("\nFileNames", 1)[0]
    return lambda: jax.block_until_ready(run(*leaves)), "jax_mpk_" in lowered.as_text(), text


def turns(runs: dict[str, Callable[[], Any]], seconds: dict[str, list[float]], turn: float, count: int) -> None:
    """Adds to `seconds`, by name, the median of the calls of each of `count` turns."""
    names = list(runs)
    for t in range(count):
        for name in names[t % len(names) :] + names[: t % len(names)]:
            time.sleep(SETTLE)
            runs[name]()
            samples, end = [], time.perf_counter() + turn
            while not samples or time.perf_counter() < end:
                start = time.perf_counter()
                runs[name]()
                samples.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(samples))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    fn, operands = CASES[name].make()
    repeated = lambda fn: looped(fn, CASES[name], args.loop) if args.loop > 1 else fn
    row: dict[str, Any] = {"case": name, "kind": CASES[name].kind, "error": None}
    runs: dict[str, Callable[[], Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs["jit"], _, plain = compiled(repeated(fn), operands)
        start = time.perf_counter()
        chooses = megakernelize(fn, options={"choose": True})
        runs["none"], row["megakernel"], text = compiled(repeated(chooses), operands)
        row["same"] = text == plain
        row["compile"] = time.perf_counter() - start
        try:
            row["prediction"] = chooses.predict(*operands).document()
        except UnsupportedError as error:
            row["prediction"] = {"xla": None, "megakernel": None, "bound": False, "text": str(error)}
        if args.named:
            try:
                runs["named"], _, _ = compiled(
                    repeated(megakernelize(fn, implementation=args.platform, options={"choose": True})), operands
                )
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    seconds: dict[str, list[float]] = {k: [] for k in runs}
    for attempt in range(1 + args.again):
        turns(runs, seconds, args.turn, args.turns)
        medians = {k: statistics.median(v) for k, v in seconds.items()}
        missed = not row["megakernel"] and medians["jit"] > MISSED * medians.get("named", np.inf)
        if medians["none"] <= SLOWER * medians["jit"] and not (missed and attempt == 0):
            break
    row["us"] = {k: 1e6 * v / args.loop for k, v in medians.items()}
    row["samples"] = seconds
    row["ratio"] = medians["none"] / medians["jit"]
    row["missed"] = bool(missed)
    return row


def slower(row: dict[str, Any]) -> bool:
    """Whether choosing cost time. Where XLA made one program of both, a difference is the machine's."""
    return row["ratio"] > SLOWER and not row["same"]


def line(row: dict[str, Any]) -> list[str]:
    us, p = row["us"], row["prediction"]
    show = lambda x: "-" if x is None else f"{x:,.1f}"
    best = us["jit"] / us["named"] if "named" in us else None
    return [row["kind"], row["case"], show(us["jit"]), show(us["none"]), f"{row['ratio']:.2f}",
            "megakernel" if row["megakernel"] else "xla, the same" if row["same"] else "xla", show(p["xla"]), (">" if p["bound"] else "") + show(p["megakernel"]), show(us.get("named")),
            "-" if best is None else f"{best:.2f}", f"{row['compile']:.2f}",
            ("SLOWER " if slower(row) else "") + ("missed" if row["missed"] else "")]  # fmt: skip


COLUMNS = ("kind", "function", "jit us", "None us", "ratio", "choice", "xla predicted", "megakernel predicted", "megakernel us",
           "jit/megakernel", "compile s", "")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    drawn = Table(title=f"implementation=None against jax.jit, {machine.describe()['device']}")
    for n, name in enumerate(COLUMNS):
        drawn.add_column(name, justify="left" if n in (0, 1, 5, 11) else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*line(row))
    return drawn


def summary(rows: list[dict[str, Any]]) -> str:
    lost = [r for r in rows if slower(r)]
    noise = [r for r in rows if r["ratio"] > SLOWER and r["same"]]
    missed = [r for r in rows if r["missed"]]
    chosen = [r for r in rows if r["megakernel"]]
    gain = statistics.geometric_mean([1 / r["ratio"] for r in chosen]) if chosen else 1.0
    name = lambda r: f"{r['case']} ({r['ratio']:.2f}, {'megakernel' if r['megakernel'] else 'xla'})"
    gained = lambda r: f"{r['case']} ({r['us']['jit'] / r['us']['named']:.2f})"
    return "\n".join([
        f"{len(rows)} functions, {len(chosen)} as megakernels, {gain:.2f} x jit in the geometric mean",
        f"None > {SLOWER} x jit: {len(lost)}" + "".join(f"\n  {name(r)}" for r in lost),
        f"beyond that by noise alone, since both are one program: {len(noise)}"
        + "".join(f"\n  {name(r)}" for r in noise),
        f"missed: the megakernel more than {MISSED} x as fast, XLA chosen: {len(missed)}" + "".join(f"\n  {gained(r)}" for r in missed),
    ])  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--platform", choices=("cpu", "cuda"), default=None, help="default: what JAX finds")
    add("--only", action="append", help="cases whose name or kind contains this (any of several)")
    add("--calibrate", action="store_true", help="measure this device's constants first")
    add(
        "--named",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the named megakernel: shows missed gains",
    )
    add("--loop", type=int, help="calls in a loop inside one jit (16; on a CPU 1)")
    add("--turn", type=float, default=0.1, help="seconds of a turn")
    add("--turns", type=int, default=5)
    add("--again", type=int, default=3, help="how often the doubtful are measured again")
    add("--json", metavar="FILE", help="write everything that was measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the status is 1 where a function is slower than it may be."""
    args = parse(argv)
    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if args.platform not in (None, found):
        print(f"error: JAX finds {found}, not {args.platform}", file=sys.stderr)
        return 1
    args.platform, args.loop = found, args.loop or (16 if found == "cuda" else 1)
    if args.calibrate:
        from jax_mpk.predict.calibrate import calibrate

        print(calibrate(found))
    wanted = lambda name: args.only is None or any(t in name or t == CASES[name].kind for t in args.only)
    names = [name for name, c in CASES.items() if wanted(name) and (found == "cuda" or not c.large)]
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append(measure(name, args))
        print(" | ".join(line(rows[-1])), file=sys.stderr, flush=True)
    output.console().print(table(rows))
    print(summary(rows))
    if args.json:
        output.write_json(args.json, {"machine": machine.describe(), "arguments": vars(args), "rows": rows})
    return 1 if any(map(slower, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
