"""The blob of a program for the CPU executor: its tables, and the bytecode of every body."""

from __future__ import annotations

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cpu.operators import Compiled, compile
from jax_mpk.backends.cpu.registers import Code
from jax_mpk.backends.tables import Tables
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.passes.decompose import buffer_of


def pack(graph: Graph, tg: TaskGraph, *, name: str = "", key: bytes = b"") -> bytes:
    """The program of a refined graph and its task graph (`abi.encode`); `key`: what it is made from."""
    a = _Packer(graph, tg, buffer_of(graph))
    a.text(name or graph.name)
    sections = {"Buffer": a.buffers()}
    sections["Op"] = np.array([a.grid(n) for n in range(len(tg.grids))], abi.RECORDS["Op"])
    order = np.arange(tg.tasks) if tg.order is None else tg.order
    place = np.empty(tg.tasks, np.int64)
    place[order] = np.arange(tg.tasks)
    sections |= {"Task": a.tasks()[order]} | a.streams(place) | a.sections()
    results = sum(b.space == "result" for b in tg.buffers)
    return abi.encode(sections, key=key, workspace=tg.workspace, workers=max(1, tg.workers), args=len(graph.args),
                      results=results)  # fmt: skip


class _Packer(Tables):
    def __init__(self, graph: Graph, tg: TaskGraph, buffer: dict[int, int]):
        super().__init__(graph, tg, buffer)
        self.compiled: dict[tuple[object, ...], tuple[int, Compiled]] = {}

    def grid(self, n: int) -> np.ndarray:
        """The record of grid `n`; its codes and slots go to the pools."""
        unit = self.tg.unit(n)
        if unit is None:
            return self.operator(n, "NOP", None)
        b = unit.bound
        if b.key not in self.compiled:
            self.compiled[b.key] = (len(self.compiled), compile(b, unit.body))
        variant, compiled = self.compiled[b.key]
        row = self.operator(n, compiled.kind, b)
        row["variant"], row["prologue"], row["flags"] = variant, unit.prologue, compiled.flags
        self.cores(row, b, unit.body.cores)
        for role, codes in compiled.codes.items():
            r = abi.enum("Role", role)
            row["code"][r] = self.pools["Code"].add(b"".join(self.code(c) for c in codes))
            row["codes"][r] = len(codes)
        for param, value in compiled.params.items():
            row["params"][abi.enum("Param", param)] = value
        return row

    def code(self, c: Code) -> bytes:
        stages = []
        for record, instrs in c.stages:
            record = record.copy()
            record["first"] = self.pools["Instr"].add(instrs)
            stages.append(record.tobytes())
        record = c.record.copy()
        record["stage"], record["stages"] = self.pools["Stage"].add(b"".join(stages)), len(stages)
        record["access"] = self.pools["Access"].add(c.accesses)
        record["accesses"] = len(c.accesses) // abi.RECORDS["Access"].itemsize
        return record.tobytes()
