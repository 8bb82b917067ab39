"""Assembly: the operators, buffers and tasks of a program as the sections of a blob."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jax_mpk import abi
from jax_mpk.emit import operators
from jax_mpk.emit.operators import Compiled
from jax_mpk.emit.registers import Code
from jax_mpk.errors import MpkError
from jax_mpk.ir.graph import Graph, itemsize
from jax_mpk.ir.tasks import Csr, TaskGraph
from jax_mpk.kinds.bound import Bound, bind
from jax_mpk.passes.decompose import buffer_of

ALIGN = 64


def emit(graph: Graph, tg: TaskGraph, *, name: str = "") -> bytes:
    """The program of a refined graph and its task graph (`abi.encode`)."""
    a = _Assembler(graph, buffer_of(graph))
    a.text(name or graph.name)
    sections = {"Buffer": a.buffers(tg)}
    sections["Op"] = np.array([a.operator(tg, n) for n in range(len(tg.grids))], abi.RECORDS["Op"])
    sections["Task"], place = _tasks(tg)
    sections["Event"] = np.zeros(tg.events, abi.RECORDS["Event"])
    if tg.threshold is not None:
        sections["Event"]["threshold"] = tg.threshold
    sections |= _streams(tg, place)
    for section, pool in a.pools.items():
        sections[section] = np.frombuffer(bytes(pool.data), abi.RECORDS[section])
    results = sum(b.space == "result" for b in tg.buffers)
    return abi.encode(sections, workspace=tg.workspace, workers=max(1, tg.workers), args=len(graph.args),
                      results=results, ranks=1, iterations=1)  # fmt: skip


@dataclass
class _Pool:
    """The records of a section; runs of records with equal content are stored once."""

    size: int
    data: bytearray = field(default_factory=bytearray)
    runs: dict[bytes, int] = field(default_factory=dict)

    def add(self, run: bytes) -> int:
        """The position of the first record of `run`."""
        at = self.runs.get(run)
        if at is None:
            at = self.runs[run] = len(self.data) // self.size
            self.data += run
        return at


class _Assembler:
    def __init__(self, graph: Graph, buffer: dict[int, int]):
        self.graph, self.buffer = graph, buffer
        sections = ("Slot", "Access", "Instr", "Stage", "Code", "Const", "Name")
        self.pools = {s: _Pool(abi.RECORDS[s].itemsize) for s in sections}
        self.compiled: dict[tuple, tuple[int, Compiled]] = {}
        self.prologues: dict[tuple, int] = {}

    def text(self, s: str) -> int:
        return self.pools["Name"].add(s.encode() + b"\0")

    # ---------------------------------------------------------------------------------------------------------- buffers

    def buffers(self, tg: TaskGraph) -> np.ndarray:
        out = np.zeros(len(tg.buffers), abi.RECORDS["Buffer"])
        consts = self.pools["Const"].data
        for row, b in zip(out, tg.buffers, strict=True):
            offset = max(0, b.offset)
            if b.space == "const":
                assert b.data is not None
                offset = b.offset if b.offset >= 0 else -(-len(consts) // ALIGN) * ALIGN
                consts.extend(bytes(max(0, offset + b.nbytes - len(consts))))
                consts[offset : offset + b.nbytes] = np.ascontiguousarray(b.data).tobytes()
            row["space"], row["dtype"] = abi.enum("Space", b.space.upper()), abi.enum("Dtype", b.dtype.upper())
            row["index"], row["offset"], row["bytes"] = b.index, offset, b.nbytes
            row["alias"], row["name"] = b.alias, self.text(b.name)
        return out

    # -------------------------------------------------------------------------------------------------------- operators

    def operator(self, tg: TaskGraph, n: int) -> np.void:
        """The record of grid `n`; its codes and slots go to the pools."""
        grid = tg.grids[n]
        row = np.zeros((), abi.RECORDS["Op"])
        row["name"] = self.text(grid.name)
        if grid.op < 0:
            row["kind"] = abi.enum("Kind", "NOP")
            row["n_axes"] = len(grid.extent)
            row["extent"][: len(grid.extent)], row["tile"][: len(grid.tile)] = grid.extent, grid.tile
            return row[()]
        bound = bind(self.graph, self.graph.ops[grid.op], grid.tile)
        if tuple(x.extent for x in bound.axes) != grid.extent:
            raise MpkError(f"grid {grid.name} does not have the axes of its operator")
        if bound.key not in self.compiled:
            self.compiled[bound.key] = (len(self.compiled), operators.compile(bound))
        variant, compiled = self.compiled[bound.key]
        row["kind"], row["variant"], row["n_axes"] = abi.enum("Kind", compiled.kind), variant, len(bound.axes)
        if bound.lhs:
            row["prologue"] = self.prologues.setdefault(bound.lhs, len(self.prologues) + 1)
        row["slot"], row["slots"] = self.slots(bound), len(bound.binder.slots)
        row["access"] = self.pools["Access"].add(b"".join(compiled.accesses))
        row["accesses"], row["flags"] = len(compiled.accesses), compiled.flags
        row["extent"][: len(grid.extent)], row["tile"][: len(grid.tile)] = grid.extent, grid.tile
        for role, codes in compiled.codes.items():
            r = abi.enum("Role", role)
            row["code"][r] = self.pools["Code"].add(b"".join(self.code(c) for c in codes))
            row["codes"][r] = len(codes)
        for param, value in compiled.params.items():
            row["params"][abi.enum("Param", param)] = value
        return row[()]

    def slots(self, b: Bound) -> int:
        rows = np.zeros(len(b.binder.slots), abi.RECORDS["Slot"])
        for row, (value, base) in zip(rows, zip(b.binder.slots, b.binder.base, strict=True), strict=True):
            row["buffer"] = self.buffer[value]
            row["offset"] = base * itemsize(self.graph.values[value].dtype)
        return self.pools["Slot"].add(rows.tobytes())

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


# ---------------------------------------------------------------------------------------------------------------- tasks


def _tasks(tg: TaskGraph) -> tuple[np.ndarray, np.ndarray]:
    """The task records in linear order, and the position of every task."""
    order = np.arange(tg.tasks) if tg.order is None else tg.order
    place = np.empty(tg.tasks, np.int64)
    place[order] = np.arange(tg.tasks)
    out = np.zeros(tg.tasks, abi.RECORDS["Task"])
    out["op"], out["index"] = tg.grid_of, tg.index
    if tg.worker is not None:
        out["worker"] = tg.worker
    if tg.waits is not None and tg.triggers is not None and tg.threshold is not None:
        _ragged(out, "n_waits", "wait", tg.waits, tg.waits.data)
        _ragged(out, "n_waits", "want", tg.waits, tg.threshold[tg.waits.data])
        _ragged(out, "n_triggers", "trigger", tg.triggers, tg.triggers.data)
    return out[order], place


def _ragged(out: np.ndarray, count: str, column: str, rows: Csr, data: np.ndarray) -> None:
    sizes = np.diff(rows.start)
    if len(sizes) and sizes.max() > out[column].shape[1]:
        t = int(np.argmax(sizes))
        raise MpkError(f"task {t} has {sizes[t]} entries of {column}: the task graph is not normalised")
    out[count] = sizes
    row = rows.row_of()
    out[column][row, np.arange(len(data)) - rows.start[row]] = data


def _streams(tg: TaskGraph, place: np.ndarray) -> dict[str, np.ndarray]:
    """Tensor maps and stream entries; an entry names its task by the position of the task's record."""
    maps = np.zeros(len(tg.maps), abi.RECORDS["TensorMap"])
    for row, m in zip(maps, tg.maps, strict=True):
        row["buffer"], row["offset"], row["rank"] = m.buffer, m.offset, len(m.dims)
        row["dtype"] = abi.enum("Dtype", m.dtype.upper())
        for column, values in (("dims", m.dims), ("strides", m.strides), ("box", m.box)):
            row[column][: len(values)] = values
    s = tg.streams
    out = np.zeros(0 if s is None else len(s.task), abi.RECORDS["Stream"])
    if s is not None and len(out):
        out["task"], out["map"], out["start"], out["step"] = place[s.task], s.map, s.start, s.step
        out["frames"] = s.frames
        out["worker"] = 0 if tg.worker is None else tg.worker[s.task]
    return {"TensorMap": maps, "Stream": out}
