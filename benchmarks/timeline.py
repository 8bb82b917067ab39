"""Where the time of one step goes on a GPU: ``python -m benchmarks.timeline --model llama-3.2-1b --batch 1,8``.

The megakernel of the zoo's greedy step, built so that every task leaves four times. Operators of one kind and shape
(the same one in every layer) share a row: how long the device was at it, and per task what the time went to. "wait" is
since the block's task before; "hop" since the end of the last task that this one needed, where the block waited for it.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from benchmarks import output
from benchmarks.decode import DTYPES
from benchmarks.subject import start, subject
from jax_mpk import Options, abi, megakernelize
from jax_mpk.backends.cuda import backend as cuda
from jax_mpk.backends.cuda.build import build
from models import registry

LAUNCHES = 8
"""The last one is looked at."""
HEAD = "calls", "tasks", "span us", "wait us", "hop us", "prologue", "sums", "epilogue", "last - first"


def call(lowered: Any) -> tuple[Any, abi.Program]:
    """The custom call of a lowered function, with its workspace as a last result, and its program."""
    cuda.ready()
    e = build(lowered.program, lowered.compiled.target)
    p = abi.decode(e.blob)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in lowered.jaxpr.out_avals]
    shapes.append(jax.ShapeDtypeStruct((int(p.header["workspace"]),), np.uint8))
    b = p["Buffer"]
    kept = b[(b["space"] == abi.enum("Space", "RESULT")) & (b["alias"] >= 0)]
    f = jax.ffi.ffi_call(
        cuda.TARGET_NAME, shapes, input_output_aliases={int(x["alias"]): int(x["index"]) for x in kept}
    )
    attributes = {"program": np.frombuffer(e.blob, np.uint8), **e.attributes()}
    return jax.jit(lambda *args: f(*args, **attributes)), p


def stamps(name: str, batch: int, context: int, dtype: Any, knobs: dict[str, Any]) -> tuple[abi.Program, np.ndarray]:
    """The program, and for every task four times in us from the first one."""
    model, _ = registry.load(name, dtype=dtype, seed=0)
    made = subject(model)
    token, cache = start(model, batch, context)
    args = (jax.tree.unflatten(made.treedef, made.leaves), token, cache, np.int32(context - 1))
    lowered = megakernelize(
        made.step, implementation="cuda", options=Options(cache_dir="", profile=True, **knobs)
    ).lower(*args)
    operands = jax.tree.leaves(args)
    assert len(operands) == len(lowered.jaxpr.in_avals), "the step captures arrays"
    run, p = call(lowered)
    for _ in range(LAUNCHES):
        last = jax.block_until_ready(run(*operands))[-1]
    cuda.check()
    n = len(p["Task"])
    at = np.asarray(last).view(np.uint64)[-4 * n :].reshape(n, 4).astype(np.int64)
    first = at[:, 0].min()
    for stage in (1, 2):  # a kind of task without such a stage leaves what was there
        kept = (at[:, stage] >= at[:, stage - 1]) & (at[:, stage] <= at[:, 3])
        at[:, stage] = np.where(kept, at[:, stage], at[:, stage - 1])
    at = at - first
    return p, at / 1e3


def rows(p: abi.Program, at: np.ndarray) -> list[tuple[Any, ...]]:
    """One row for the operators of each variant, in order of first appearance; all times in us, means over tasks."""
    tasks, units = p["Task"], p["Unit"]
    op, worker = tasks["op"].astype(int), tasks["worker"].astype(int)
    idle = at[:, 0].copy()  # since the block's task before this one
    same = worker[1:] == worker[:-1]
    idle[1:][same] -= at[:-1, 3][same]
    late = hops(p, at, idle)
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for n in np.argsort([at[op == n, 0].min(initial=np.inf) for n in range(len(units))]):
        if (op == n).any():
            groups[int(units[n]["variant"])].append(int(n))
    found = []
    for ops in groups.values():
        spans, skews = [], []
        for n in ops:
            mine = at[op == n]
            spans.append(mine[:, 3].max() - mine[:, 0].min())
            skews.append(mine[:, 3].max() - mine[:, 3].min())
        mine = np.isin(op, ops)
        t = at[mine]
        waited = late[mine & (late > 0)]
        parts = [idle[mine].mean(), waited.mean() if len(waited) else 0.0, *(np.diff(t, axis=1).mean(0))]
        found.append(
            (
                p.name(int(units[ops[0]]["name"])),
                len(ops),
                int(mine.sum()) // len(ops),
                np.sum(spans),
                *parts,
                np.mean(skews),
            )
        )
    return found


def hops(p: abi.Program, at: np.ndarray, idle: np.ndarray) -> np.ndarray:
    """For every task that waited for others: us from the end of the last one that it needed until it began; else 0."""
    tasks = p["Task"]
    order = np.lexsort((tasks["index"], tasks["op"]))
    same = np.flatnonzero(np.r_[True, np.any([np.diff(tasks[f][order]) != 0 for f in ("op", "index")], axis=0)])
    end = np.empty(len(tasks))  # parts of a task trigger when the last of them ends
    for group in np.split(order, same[1:]):
        end[group] = at[group, 3].max()
    ends: dict[int, list[float]] = collections.defaultdict(list)
    for n in order[same]:
        for e in tasks["trigger"][n][: tasks["n_triggers"][n]]:
            ends[int(e)].append(end[n])
    ordered = {e: np.sort(x) for e, x in ends.items()}
    out = np.zeros(len(tasks))
    for n, t in enumerate(tasks):
        k = int(t["n_waits"])
        ready = max((ordered[int(e)][int(w) - 1] for e, w in zip(t["wait"][:k], t["want"][:k])), default=-1.0)
        if ready >= at[n, 0] - idle[n] - 1e-9:  # else the block was at another task
            out[n] = at[n, 0] - ready
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="llama-3.2-1b", help="comma list")
    add("--batch", default="1", type=output.integers, help="comma list")
    add("--context", default=1000, type=int)
    add("--dtype", default="bf16", choices=DTYPES)
    add("--window", type=int, help="copies in flight")
    args = parser.parse_args(argv)
    knobs = {"window": args.window} if args.window else {}
    for name in args.model.split(","):
        for batch in args.batch:
            p, at = stamps(name, batch, args.context, DTYPES[args.dtype], knobs)
            table = Table(
                title=f"{name}, batch {batch}: {at.max():.0f} us; idle {_idle(p, at):.0%} of the blocks' time"
            )
            table.add_column("operator")
            for head in HEAD:
                table.add_column(head, justify="right")
            for row in rows(p, at):
                table.add_row(row[0], *(str(x) for x in row[1:3]), *(f"{x:.2f}" for x in row[3:]))
            output.console().print(table)
    return 0


def _idle(p: abi.Program, at: np.ndarray) -> float:
    return 1 - float((at[:, 3] - at[:, 0]).sum() / (at.max() * int(p.header["workers"])))


if __name__ == "__main__":
    sys.exit(main())
