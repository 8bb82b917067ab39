"""The blob of a program for one GPU: its tables as the workers walk them, the kernel's text, and what the text touches.

Nothing is decided here: variants, parts, workers and streams are the task graph's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cuda import source
from jax_mpk.backends.tables import Tables, access
from jax_mpk.device import Device
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Nest, outside
from jax_mpk.ir.expr import Expr, Load, Reduce
from jax_mpk.ir.graph import Graph
from jax_mpk.ir.pieces import Box, boxes
from jax_mpk.ir.place import Place
from jax_mpk.ir.tasks import TaskGraph
from jax_mpk.kinds.bound import Bound
from jax_mpk.passes.decompose import buffer_of

ALIGN = 256
STAMPS = 32
"""Bytes of the times that a task leaves when profiled."""


def pack(graph: Graph, tg: TaskGraph, device: Device, *, name: str = "", key: bytes = b"") -> bytes:
    """The program of a refined graph and its task graph (`abi.encode`); `key`: what it is made from."""
    a = _Packer(graph, tg, buffer_of(graph))
    a.text(name or graph.name)
    sections = {"Buffer": a.buffers()}
    results = sum(b.space == "result" for b in tg.buffers)
    text = source.generate(tg, device, len(graph.args) + results)
    sections["Op"] = np.array([a.grid(n) for n in range(len(tg.grids))], abi.RECORDS["Op"])
    records, place = a.records()
    sections |= {"Task": records} | a.streams(place)
    by = np.lexsort((np.arange(len(sections["Stream"])), sections["Stream"]["task"]))
    sections["Stream"] = sections["Stream"][by]
    units, tickets = a.units(text.variants)
    spill_at = -(-tg.workspace // ALIGN) * ALIGN
    profile = STAMPS * len(records) if device.profile else 0
    s = tg.shared
    kernel = (s.act, s.acc, s.total, s.ring, spill_at, s.spill, tickets, profile)
    sections |= {"Unit": units, "Kernel": np.array([kernel], abi.RECORDS["Kernel"])} | a.sections()
    sections["Source"] = np.frombuffer(text.text.encode(), abi.RECORDS["Source"])
    workspace = max(spill_at + s.spill * tg.workers + profile, ALIGN)
    return abi.encode(sections, key=key, workspace=workspace, workers=max(1, tg.workers), args=len(graph.args),
                      results=results)  # fmt: skip


class _Packer(Tables):
    def __init__(self, graph: Graph, tg: TaskGraph, buffer: dict[int, int]):
        super().__init__(graph, tg, buffer)
        self.codes: dict[tuple[object, ...], dict[str, tuple[int, int]]] = {}

    def grid(self, n: int) -> np.ndarray:
        """The record of grid `n`; the loads and stores of its body go to the pools."""
        unit = self.tg.unit(n)
        if unit is None:
            return self.operator(n, "NOP", None)
        b, body = unit.bound, unit.body
        row = self.operator(n, body.kind, b)
        row["prologue"], row["flags"] = unit.prologue, abi.IN_PLACE if body.in_place else 0
        self.cores(row, b, body.cores)
        if b.key not in self.codes:
            self.codes[b.key] = {role: self.role(b, nests) for role, nests in body.nests.items()}
        for role, (first, count) in self.codes[b.key].items():
            r = abi.enum("Role", role)
            row["code"][r], row["codes"][r] = first, count
        for param, value in body.params.items():
            row["params"][abi.enum("Param", param)] = value
        return row

    def records(self) -> tuple[np.ndarray, np.ndarray]:
        """The task records by worker, and the position of every task's first part."""
        tg = self.tg
        assert tg.order is not None and tg.shares is not None
        rank = np.empty(tg.tasks, np.int64)
        rank[tg.order] = np.arange(tg.tasks)
        of, worker = tg.shares.row_of().astype(np.int64), tg.shares.data
        part = np.arange(len(of)) - tg.shares.start[of]
        by = np.lexsort((part, rank[of], worker))
        out = self.tasks()[of[by]]
        out["worker"], out["part"] = worker[by], part[by]
        place = np.full(tg.tasks, -1, np.int64)
        first = np.flatnonzero(part[by] == 0)
        place[of[by][first]] = first
        return out, place

    def units(self, variants: list[int]) -> tuple[np.ndarray, int]:
        out, tickets = np.zeros(len(self.tg.grids), abi.RECORDS["Unit"]), 0
        for n, grid in enumerate(self.tg.grids):
            unit, row = self.tg.unit(n), out[n]
            row["variant"], row["name"], row["parts"] = variants[n], self.text(grid.name), 1
            if unit is None:
                continue
            row["slot"], row["slots"] = self.slots(unit.bound), len(unit.bound.binder.slots)
            row["prologue"], row["flags"] = unit.prologue, abi.STREAMED if unit.variant.streamed else 0
            if unit.variant.parts > 1:
                row["parts"], row["ticket"], tickets = unit.variant.parts, tickets, tickets + grid.count
            if unit.partial >= 0:
                row["partial"], row["share"] = self.tg.buffers[unit.partial].offset, unit.variant.partial
                row["buffer"] = unit.partial
        return out, tickets

    # ------------------------------------------------------------------------------------------ what the text touches

    def role(self, b: Bound, nests: Iterable[Nest]) -> tuple[int, int]:
        records = [self.code(b, nest) for nest in nests]
        return self.pools["Code"].add(b"".join(records)), len(records)

    def code(self, b: Bound, nest: Nest) -> bytes:
        """The loads and stores of a nest as a code without registers: a stage for every piece of a reduction, one for the
        rest."""
        accesses: dict[bytes, int] = {}
        stages = []
        for bound, box, roots in _stages(nest):
            axes = {**b.number, **{a: len(b.number) + j for j, a in enumerate(bound)}}
            loads = [("LOAD", nest.place(x)) for x in roots if isinstance(x, Load | E.Acc)]
            instrs = [_instr(op, p, axes, accesses) for op, p in loads]
            record = np.zeros((), abi.RECORDS["Stage"])
            if bound:
                record["kind"], record["axis"], record["axes"] = (
                    abi.enum("StageKind", "REDUCE"),
                    len(b.number),
                    len(bound),
                )
                for j, a in enumerate(bound):
                    record["lo"][j], record["hi"][j] = box[a]
            else:
                s = nest.store
                op = abi.COMBINES.get(s.mode, "STORE" if s.where is None else "STORE_IF")
                instrs.append(_instr(op, s.place, axes, accesses))
            record["count"], record["first"] = len(instrs), self.pools["Instr"].add(b"".join(instrs))
            stages.append(record.tobytes())
        out = np.zeros((), abi.RECORDS["Code"])
        out["axes"], out["vector"], out["n_axes"] = sum(1 << b.number[a] for a in nest.box), -1, len(b.number)
        out["stage"], out["stages"] = self.pools["Stage"].add(b"".join(stages)), len(stages)
        out["access"], out["accesses"] = self.pools["Access"].add(b"".join(accesses)), len(accesses)
        out["hi"] = np.iinfo(np.int32).max
        for a, (lo, hi) in nest.box.items():
            out["lo"][b.number[a]], out["hi"][b.number[a]] = lo, hi
        return out.tobytes()


def _stages(nest: Nest) -> Iterator[tuple[tuple[int, ...], Box, list[Expr]]]:
    """(axes, their ranges, nodes) of every piece of every reduction, and of everything outside of them (no axes)."""
    found = outside(nest.roots, nest.args)
    reduces = [x for x in found if isinstance(x, Reduce)]
    seen = set(reduces)
    for r in reduces:  # grows by those in their bodies
        for box, body in boxes(r.body, {a: (0, n) for a, n in zip(r.bound, r.extents, strict=True)}):
            nodes = outside([body], nest.args)
            new = [x for x in nodes if isinstance(x, Reduce) and x not in seen]
            seen.update(new)
            reduces += new
            yield r.bound, box, nodes
    yield (), {}, found


def _instr(op: str, place: Place, axes: Mapping[int, int], accesses: dict[bytes, int]) -> bytes:
    record = np.zeros((), abi.RECORDS["Instr"])
    key = access(place, axes)
    record["op"], record["aux"] = abi.enum("Opcode", op), accesses.setdefault(key, len(accesses))
    return record.tobytes()
