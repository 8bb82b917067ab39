"""Hand-built programs for the tests of the executor: records straight into `abi.encode`, no compiler involved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_mpk import abi

V = abi.VECTOR_REG


def record(section: str, /, **fields: Any) -> np.ndarray:
    """A record with the given fields; a sequence fills the beginning of an array field."""
    out = np.zeros((), abi.RECORDS[section])
    for name, value in fields.items():
        if isinstance(value, list | tuple):
            out[name][: len(value)] = value
        else:
            out[name] = value
    return out


@dataclass
class Access:
    """`slot` is relative to the operator (or scratch); `dyn` lists (register, limit, stride)."""

    slot: int
    dtype: str = "F32"
    stride: tuple[int, ...] = ()
    offset: int = 0
    dyn: tuple[tuple[int, int, int], ...] = ()

    def record(self) -> np.ndarray:
        regs, limits, steps = zip(*self.dyn, strict=True) if self.dyn else ((), (), ())
        return record(
            "Access",
            slot=self.slot,
            dtype=abi.enum("Dtype", self.dtype),
            n_dyn=len(self.dyn),
            dyn_reg=regs,
            dyn_limit=limits,
            dyn_stride=steps,
            offset=self.offset,
            stride=self.stride,
        )


def instr(op: str, dst: int = 0, a: int = 0, b: int = 0, c: int = 0, aux: int = 0, imm: float | int = 0) -> np.ndarray:
    bits = int(np.float32(imm).view(np.uint32)) if isinstance(imm, float) else imm & 0xFFFFFFFF
    return record("Instr", op=abi.enum("Opcode", op), dst=dst, a=a, b=b, c=c, aux=aux, imm=bits)


@dataclass
class Stage:
    kind: str
    instrs: list[np.ndarray]
    reduce: str = "SUM"
    dtype: str = "F32"
    axis: int = 0
    lo: tuple[int, ...] = ()
    hi: tuple[int, ...] = ()
    src: int = 0
    dst: int = 0
    flags: int = 0


@dataclass
class Code:
    """`box`: axis -> (lo, hi); axes that are not named do not loop."""

    stages: list[Stage]
    accesses: list[Access]
    box: dict[int, tuple[int, int]]
    vector: int = -1


@dataclass
class Builder:
    workers: int = 2
    workspace: int = 0
    args: int = 0
    results: int = 0
    rows: dict[str, list[np.ndarray]] = field(default_factory=lambda: {n: [] for n in abi.SECTIONS})
    names: bytes = b"\0"
    grids: list[int] = field(default_factory=list)
    consts: bytes = b""

    def add(self, section: str, row: np.ndarray) -> int:
        self.rows[section].append(row)
        return len(self.rows[section]) - 1

    def name(self, text: str) -> int:
        at = len(self.names)
        self.names += text.encode() + b"\0"
        return at

    def arg(self, nbytes: int, dtype: str = "F32") -> int:
        self.args += 1
        return self._buffer("ARG", nbytes, dtype, self.args - 1, 0)

    def result(self, nbytes: int, dtype: str = "F32", alias: int = -1) -> int:
        self.results += 1
        return self._buffer("RESULT", nbytes, dtype, self.results - 1, 0, alias)

    def temp(self, nbytes: int, dtype: str = "F32") -> int:
        at = self.workspace
        self.workspace += -(-nbytes // 64) * 64
        return self._buffer("WORKSPACE", nbytes, dtype, 0, at)

    def const(self, data: np.ndarray) -> int:
        at = len(self.consts)
        self.consts += data.tobytes() + b"\0" * (-data.nbytes % 64)
        return self._buffer("CONST", data.nbytes, "F32", 0, at)

    def _buffer(self, space: str, nbytes: int, dtype: str, index: int, offset: int, alias: int = -1) -> int:
        return self.add(
            "Buffer",
            record(
                "Buffer",
                space=abi.enum("Space", space),
                dtype=abi.enum("Dtype", dtype),
                index=index,
                offset=offset,
                bytes=nbytes,
                alias=alias,
            ),
        )

    def op(
        self,
        kind: str,
        name: str,
        extent: tuple[int, ...],
        tile: tuple[int, ...],
        slots: list[int],
        codes: dict[str, list[Code]],
        accesses: list[Access] = (),
        params: dict[str, int] | None = None,
        prologue: int = 0,
    ) -> int:
        """An operator over buffers `slots`; returns its number."""
        first = len(self.rows["Slot"])
        for b in slots:
            self.add("Slot", record("Slot", buffer=b))
        position, count = [0] * 12, [0] * 12
        for role, some in codes.items():
            r = abi.enum("Role", role)
            numbers = [self._code(c, len(extent)) for c in some]
            position[r], count[r] = numbers[0], len(numbers)
        at = len(self.rows["Access"])
        for x in accesses:
            self.add("Access", x.record())
        values = [0] * 20
        for key, v in (params or {}).items():
            values[abi.enum("Param", key)] = v
        self.grids.append(math.prod(-(-e // t) for e, t in zip(extent, tile, strict=True)))
        return self.add(
            "Op",
            record(
                "Op",
                kind=abi.enum("Kind", kind),
                n_axes=len(extent),
                slot=first,
                slots=len(slots),
                access=at,
                accesses=len(accesses),
                name=self.name(name),
                extent=extent,
                tile=tile,
                code=position,
                codes=count,
                params=values,
                prologue=prologue,
            ),
        )

    def _code(self, c: Code, n_axes: int) -> int:
        at = len(self.rows["Access"])
        for x in c.accesses:
            self.add("Access", x.record())
        stage = len(self.rows["Stage"])
        for s in c.stages:
            first = len(self.rows["Instr"])
            for i in s.instrs:
                self.add("Instr", i)
            self.add(
                "Stage",
                record(
                    "Stage",
                    kind=abi.enum("StageKind", s.kind),
                    reduce=abi.enum("ReduceOp", s.reduce),
                    dtype=abi.enum("Dtype", s.dtype),
                    flags=s.flags,
                    first=first,
                    count=len(s.instrs),
                    axis=s.axis,
                    axes=len(s.lo),
                    src=s.src,
                    dst=s.dst,
                    lo=s.lo,
                    hi=s.hi,
                ),
            )
        lo, hi = [0] * n_axes, [0] * n_axes
        for a, (x, y) in c.box.items():
            lo[a], hi[a] = x, y
        return self.add(
            "Code",
            record(
                "Code",
                stage=stage,
                stages=len(c.stages),
                access=at,
                accesses=len(c.accesses),
                axes=sum(1 << a for a in c.box),
                vector=c.vector,
                scalar_regs=64,
                vector_regs=64,
                n_axes=n_axes,
                lo=lo,
                hi=hi,
            ),
        )

    def event(self, threshold: int) -> int:
        return self.add("Event", record("Event", threshold=threshold))

    def tasks(self, op: int, waits: tuple[int, ...] = (), triggers: tuple[int, ...] = ()) -> None:
        """Every task of an operator, round robin over the workers; `want` is the threshold of the event."""
        for index in range(self.grids[op]):
            self.task(op, index, len(self.rows["Task"]) % self.workers, waits, triggers)

    def task(
        self, op: int, index: int, worker: int, waits: tuple[int, ...] = (), triggers: tuple[int, ...] = ()
    ) -> None:
        want = [int(self.rows["Event"][e]["threshold"]) for e in waits]
        self.add(
            "Task",
            record(
                "Task",
                op=op,
                index=index,
                worker=worker,
                n_waits=len(waits),
                n_triggers=len(triggers),
                wait=waits,
                want=want,
                trigger=triggers,
            ),
        )

    def blob(self) -> bytes:
        sections = {n: np.array(rows, abi.RECORDS[n]) for n, rows in self.rows.items()}
        sections["Name"] = np.frombuffer(self.names, abi.RECORDS["Name"])
        sections["Const"] = np.frombuffer(self.consts, abi.RECORDS["Const"])
        return abi.encode(
            sections,
            workspace=self.workspace,
            workers=self.workers,
            args=self.args,
            results=self.results,
        )


def elementwise(b: Builder, name: str, x: int, out: int, n: int, tile: int, ops: list[np.ndarray], last: int) -> int:
    """`out[i] = f(x[i])`, where `ops` compute vector register `last` from vector register 0."""
    body = [instr("LOAD", V), *ops, instr("STORE", a=last, aux=1)]
    code = Code([Stage("VECTOR", body)], [Access(0, stride=(1,)), Access(1, stride=(1,))], {0: (0, n)}, vector=0)
    return b.op("ROWS", name, (n,), (tile,), [x, out], {"MAIN": [code]})


def matmul(
    b: Builder,
    name: str,
    x: int,
    w: int,
    out: int,
    m: int,
    n: int,
    k: int,
    *,
    tile: tuple[int, int],
    wtype: str = "F32",
    wstride: tuple[int, int] = (0, 0),
    prologue: int = 0,
) -> int:
    """`out[m, n] = x[m, k] @ w`, f32 activations; `wstride` is (stride_n, stride_k), by default w is [k, n]."""
    sn, sk = wstride if any(wstride) else (1, n)
    lhs = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [Access(0, stride=(k, 0, 1)), Access(abi.SLOT_ACT, stride=(k, 0, 1))],
        {0: (0, m), 2: (0, k)},
        2,
    )
    row = min(tile[1], n)
    epilogue = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [Access(abi.SLOT_ACC, stride=(row, 1, 0)), Access(2, stride=(n, 1, 0))],
        {0: (0, m), 1: (0, n)},
        1,
    )
    params = dict(RHS0=0, N_RHS=1, N_M=1, N_N=1, N_K=1, REDUCE_DTYPE=abi.enum("Dtype", "F32"))
    return b.op(
        "CONTRACT",
        name,
        (m, n, k),
        (*tile, k),
        [x, w, out],
        {"LHS": [lhs], "EPILOGUE": [epilogue]},
        [Access(1, wtype, (0, sn, sk))],
        params,
        prologue,
    )
