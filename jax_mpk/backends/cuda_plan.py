"""A program for one CUDA device: tasks dealt to its blocks, attention split over them, the streams sorted by block.

The result is a blob of the same format with other sections (see `Unit` in `jax_mpk.abi`): what the launcher and the
kernel need at run time, and no codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mpk import abi
from jax_mpk.backends import cuda_source

ALIGN = 256


@dataclass(frozen=True)
class Plan:
    """`blob`: the planned program. `spill`: byte offset of the blocks' own scratch in the workspace. `tickets`: how many
    counters split tasks need."""

    blob: bytes
    spill: int
    tickets: int


STAMPS = 32
"""Bytes of the times that a task leaves when profiled."""


def plan(
    program: abi.Program, source: cuda_source.Source, workers: int, profile: bool = False, key: bytes = b""
) -> Plan:
    """The plan for `workers` blocks; needs the decisions of `source` about every operator. `key`: the SHA-256 of the
    machine code that was made of `source`."""
    ops, tasks, units = program["Op"], program["Task"], source.units
    parts = np.array([u.parts for u in units], np.int64)[tasks["op"]] if len(tasks) else np.zeros(0, np.int64)
    of = np.repeat(np.arange(len(tasks)), parts)
    part = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    worker = (tasks["worker"].astype(np.int64)[of]) % workers
    worker = _spread(tasks["op"][of], parts[of] > 1, worker, workers)
    order = np.lexsort((np.arange(len(of)), worker))  # within a block: the linear order
    out = tasks[of[order]].copy()
    out["worker"], out["pad"] = worker[order], part[order]

    streams = program["Stream"]
    keep = (
        np.array([u.stream for u in units], bool)[tasks["op"][streams["task"]]]
        if source.ring and len(streams)
        else np.zeros(0, bool)
    )
    streams = streams[keep].copy() if len(keep) else streams[:0].copy()
    if len(streams):
        place = np.full(len(tasks), -1, np.int64)
        place[of[order]] = np.arange(len(of))  # streamed tasks have one part
        at = place[streams["task"]]
        by = np.lexsort((np.arange(len(streams)), at))
        streams = streams[by]
        streams["task"], streams["worker"] = at[by], out["worker"][at[by]]

    workspace = int(program.header["workspace"])
    records = np.zeros(len(ops), abi.RECORDS["Unit"])
    tickets = 0
    for n, u in enumerate(units):
        workspace = -(-workspace // ALIGN) * ALIGN
        records[n] = (
            u.variant,
            ops[n]["slot"],
            ops[n]["slots"],
            ops[n]["prologue"],
            tickets,
            ops[n]["name"],
            workspace,
        )
        workspace += u.partial
        tickets += u.tickets
    spill = -(-workspace // ALIGN) * ALIGN
    sections = {name: program[name] for name in ("Buffer", "Slot", "Event", "TensorMap", "Const", "Name")}
    sections |= {"Task": out, "Stream": streams, "Unit": records}
    head = {k: int(program.header[k]) for k in ("args", "results", "ranks", "rank", "iterations")}
    head |= {"workspace": max(spill + source.spill * workers + profile * STAMPS * len(out), ALIGN), "workers": workers}
    return Plan(abi.encode(sections, key=key, **head), spill, tickets)


def _spread(op: np.ndarray, split: np.ndarray, worker: np.ndarray, workers: int) -> np.ndarray:
    """Parts of split tasks go round the blocks, each operator starting where the last one stopped."""
    out = worker.copy()
    at = np.flatnonzero(split)
    out[at] = np.arange(len(at)) % workers
    return out
