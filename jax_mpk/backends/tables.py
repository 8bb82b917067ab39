"""The sections of a blob that every back end has: names, constants, buffers, slots, accesses, events, streams."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import MpkError
from jax_mpk.ir.graph import Graph, itemsize
from jax_mpk.ir.place import Place
from jax_mpk.ir.tasks import Csr, TaskGraph
from jax_mpk.kinds.bound import Bound

ALIGN = 64
_ACCESS = struct.Struct(f"<HBB{abi.MAX_DYN}HI{abi.MAX_DYN}iq{abi.MAX_AXES}q{abi.MAX_DYN}q")
_DTYPE = {name.lower(): n for n, name in enumerate(abi.ENUMS["Dtype"])}
assert _ACCESS.size == abi.RECORDS["Access"].itemsize


def access(p: Place, axes: Mapping[int, int], dyn: tuple[int, ...] | None = None) -> bytes:
    """The record of an access: `axes` numbers the axis ids, `dyn` are the registers of its dynamic coordinates."""
    strides = [0] * abi.MAX_AXES
    for axis, stride in p.strides.items():
        strides[axes[axis]] = stride
    dyn = (0,) * len(p.dyn) if dyn is None else dyn
    pad = [0] * (abi.MAX_DYN - len(dyn))
    limits = [limit for _, limit, _ in p.dyn] + pad
    steps = [stride for _, _, stride in p.dyn] + pad
    return _ACCESS.pack(p.slot, _DTYPE[p.dtype], len(dyn), *dyn, *pad, 0, *limits, p.offset, *strides, *steps)


@dataclass
class Pool:
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


class Tables:
    """Sections as they grow; `sections` gives them all. buffer: of every value."""

    def __init__(self, graph: Graph, tg: TaskGraph, buffer: Mapping[int, int]):
        self.graph, self.tg, self.buffer = graph, tg, buffer
        names = ("Slot", "Access", "Instr", "Stage", "Code", "Const", "Name")
        self.pools = {s: Pool(abi.RECORDS[s].itemsize) for s in names}

    def sections(self) -> dict[str, np.ndarray]:
        out = {s: np.frombuffer(bytes(p.data), abi.RECORDS[s]) for s, p in self.pools.items()}
        out["Event"] = np.zeros(self.tg.events, abi.RECORDS["Event"])
        if self.tg.threshold is not None:
            out["Event"]["threshold"] = self.tg.threshold
        return out

    def text(self, s: str) -> int:
        return self.pools["Name"].add(s.encode() + b"\0")

    def buffers(self) -> np.ndarray:
        out = np.zeros(len(self.tg.buffers), abi.RECORDS["Buffer"])
        consts = self.pools["Const"].data
        for row, b in zip(out, self.tg.buffers, strict=True):
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

    def operator(self, n: int, kind: str, b: Bound | None) -> np.ndarray:
        """The record of grid `n` as far as no back end matters: name, axes, slots."""
        grid = self.tg.grids[n]
        row = np.zeros((), abi.RECORDS["Op"])
        row["name"], row["kind"], row["n_axes"] = self.text(grid.name), abi.enum("Kind", kind), len(grid.extent)
        row["extent"][: len(grid.extent)], row["tile"][: len(grid.tile)] = grid.extent, grid.tile
        if b is not None:
            if tuple(x.extent for x in b.axes) != grid.extent:
                raise MpkError(f"grid {grid.name} does not have the axes of its operator")
            row["slot"], row["slots"] = self.slots(b), len(b.binder.slots)
        return row

    def slots(self, b: Bound) -> int:
        rows = np.zeros(len(b.binder.slots), abi.RECORDS["Slot"])
        for row, (value, base) in zip(rows, zip(b.binder.slots, b.binder.base, strict=True), strict=True):
            row["buffer"] = self.buffer[value]
            row["offset"] = base * itemsize(self.graph.values[value].dtype)
        return self.pools["Slot"].add(rows.tobytes())

    def cores(self, row: np.ndarray, b: Bound, places: Mapping[str, Place]) -> None:
        """The core accesses of an operator, and the parameters that number them."""
        row["access"] = self.pools["Access"].add(b"".join(access(p, b.number) for p in places.values()))
        row["accesses"] = len(places)
        for n, name in enumerate(places):
            row["params"][abi.enum("Param", name)] = n

    def tasks(self) -> np.ndarray:
        """The task records, task by task."""
        tg = self.tg
        out = np.zeros(tg.tasks, abi.RECORDS["Task"])
        out["op"], out["index"] = tg.grid_of, tg.index
        if tg.worker is not None:
            out["worker"] = tg.worker
        if tg.waits is not None and tg.triggers is not None and tg.threshold is not None:
            _ragged(out, "n_waits", "wait", tg.waits, tg.waits.data)
            _ragged(out, "n_waits", "want", tg.waits, tg.threshold[tg.waits.data])
            _ragged(out, "n_triggers", "trigger", tg.triggers, tg.triggers.data)
        return out

    def streams(self, place: np.ndarray) -> dict[str, np.ndarray]:
        """Tensor maps and stream entries, which name their task by its record, `place[task]`."""
        tg, s = self.tg, self.tg.streams
        maps = np.zeros(len(tg.maps), abi.RECORDS["TensorMap"])
        for row, m in zip(maps, tg.maps, strict=True):
            row["buffer"], row["offset"], row["rank"] = m.buffer, m.offset, len(m.dims)
            row["dtype"] = abi.enum("Dtype", m.dtype.upper())
            for column, values in (("dims", m.dims), ("strides", m.strides), ("box", m.box)):
                row[column][: len(values)] = values
        out = np.zeros(0 if s is None else len(s.task), abi.RECORDS["Stream"])
        if s is not None and len(out):
            out["task"], out["map"], out["start"], out["step"] = place[s.task], s.map, s.start, s.step
            out["frames"] = s.frames
            out["worker"] = 0 if tg.worker is None else tg.worker[s.task]
        return {"TensorMap": maps, "Stream": out}


def _ragged(out: np.ndarray, count: str, column: str, rows: Csr, data: np.ndarray) -> None:
    sizes = np.diff(rows.start)
    if len(sizes) and sizes.max() > out[column].shape[1]:
        t = int(np.argmax(sizes))
        raise MpkError(f"task {t} has {sizes[t]} entries of {column}: the task graph is not normalised")
    out[count] = sizes
    row = rows.row_of()
    out[column][row, np.arange(len(data)) - rows.start[row]] = data
