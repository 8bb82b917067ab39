"""From stages over virtual registers to records: linear-scan allocation in two register files, accesses, encoding."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.tables import access
from jax_mpk.errors import MpkError
from jax_mpk.ir.pieces import Box
from jax_mpk.ir.place import Place


class RegisterPressure(MpkError):
    """An expression that needs more than MAX_REGS registers: `refine` splits such operators."""


@dataclass
class Instr:
    """One instruction. `dyn`: registers of the dynamic coordinates of `place`. `vector`: the result is a vector."""

    op: str
    dst: int | None
    srcs: tuple[int, ...] = ()
    place: Place | None = None
    dyn: tuple[int, ...] = ()
    imm: float | bool = 0
    dtype: str = "i32"
    vector: bool = False


@dataclass
class Stage:
    """A stage; for REDUCE: operator, type, bound axis ids, their ranges, `src`, `dst` and whether it goes on."""

    kind: str
    instrs: list[Instr] = field(default_factory=list)
    reduce: str = ""
    dtype: str = "f32"
    bound: tuple[int, ...] = ()
    ranges: list[tuple[int, int]] = field(default_factory=list)
    src: int = -1
    dst: int = -1
    accumulate: bool = False


@dataclass(frozen=True)
class Code:
    """An encoded code: its record without the stage and access positions, and the sections' records that it needs.

    `stages` are (record with `first` 0, instruction records).
    """

    record: np.ndarray
    stages: tuple[tuple[np.ndarray, bytes], ...]
    accesses: bytes


def encode(stages: list[Stage], number: Mapping[int, int], mask: int, box: Box, vector: int) -> Code:
    """The code of these stages; `number` and `box` are over loop axes, `vector` is a loop axis or -1."""
    physical, scalars, vectors = _allocate(stages)
    if max(scalars, vectors) > abi.MAX_REGS:
        raise RegisterPressure(f"{scalars} scalar and {vectors} vector registers, there are {abi.MAX_REGS} of each")
    accesses: dict[bytes, int] = {}
    out = []
    for s in stages:
        axes = dict(number) | {a: len(number) + j for j, a in enumerate(s.bound)}
        rows = b"".join(_instr(i, physical, axes, accesses) for i in s.instrs)
        out.append((_stage(s, physical, len(number)), rows))
    record = np.zeros((), abi.RECORDS["Code"])
    record["axes"], record["vector"], record["n_axes"] = mask, vector, len(number)
    record["scalar_regs"], record["vector_regs"] = scalars, vectors
    record["hi"] = np.iinfo(np.int32).max  # axes outside of the box are not restricted
    for axis, (lo, hi) in box.items():
        record["lo"][axis], record["hi"][axis] = lo, hi
    return Code(record, tuple(out), b"".join(accesses))


def _stage(s: Stage, physical: Mapping[int, int], n_axes: int) -> np.ndarray:
    record = np.zeros((), abi.RECORDS["Stage"])
    record["kind"] = abi.enum("StageKind", s.kind)
    record["count"] = len(s.instrs)
    if s.kind == "REDUCE":
        record["reduce"] = abi.enum("ReduceOp", s.reduce.upper())
        record["dtype"] = abi.enum("Dtype", s.dtype.upper())
        record["flags"] = abi.ACCUMULATE if s.accumulate else 0
        record["axis"], record["axes"] = n_axes, len(s.bound)
        record["src"], record["dst"] = physical[s.src], physical[s.dst]
        for j, (lo, hi) in enumerate(s.ranges):
            record["lo"][j], record["hi"][j] = lo, hi
    return record


_INSTR = struct.Struct("<BxHHHHHI")
assert _INSTR.size == abi.RECORDS["Instr"].itemsize
_OPCODE = {name: n for n, name in enumerate(abi.ENUMS["Opcode"])}


def _instr(i: Instr, physical: Mapping[int, int], axes: Mapping[int, int], accesses: dict[bytes, int]) -> bytes:
    aux = 0
    if i.place is not None:
        key = access(i.place, axes, tuple(physical[r] for r in i.dyn))
        aux = accesses.setdefault(key, len(accesses))
    srcs = [physical[r] for r in i.srcs] + [0] * (3 - len(i.srcs))
    dst = 0 if i.dst is None else physical[i.dst]
    return _INSTR.pack(_OPCODE[i.op], dst, *srcs, aux, _bits(i.imm, i.dtype))


def _bits(value: float | bool, dtype: str) -> int:
    if dtype == "f32":
        with np.errstate(over="ignore"):
            return int(np.float32(value).view(np.uint32))
    return int(value) & 0xFFFFFFFF


def _allocate(stages: list[Stage]) -> tuple[dict[int, int], int, int]:
    """Physical registers by virtual ones, and how many of each file are used.

    A scalar register that a loop (a REDUCE or VECTOR stage) reads is live to the end of that stage. No instruction
    writes a register that it reads.
    """
    last: dict[int, int] = {}
    at = 0
    for s in stages:
        begin, at = at, at + len(s.instrs) + 1
        defined = {i.dst for i in s.instrs}
        for n, i in enumerate(s.instrs):
            for r in (*i.srcs, *i.dyn):
                last[r] = begin + n if s.kind == "SCALAR" or r in defined else at - 1
            if i.dst is not None:
                last.setdefault(i.dst, begin + n)
        if s.kind == "REDUCE":
            last[s.src] = at - 1
            last[s.dst] = at - 1
    physical: dict[int, int] = {}
    files = (_File(0), _File(abi.VECTOR_REG))
    expire: dict[int, list[int]] = {}
    for r, end in last.items():
        expire.setdefault(end, []).append(r)
    at = 0

    def define(r: int, vector: bool) -> None:
        if r not in physical:
            physical[r] = files[vector].take()

    def free(at: int) -> None:
        for r in expire.get(at, ()):
            if r in physical:
                files[physical[r] >= abi.VECTOR_REG].free.append(physical[r])

    for s in stages:
        for i in s.instrs:
            if i.dst is not None:
                define(i.dst, i.vector)
            free(at)
            at += 1
        if s.kind == "REDUCE":
            define(s.dst, False)
        free(at)
        at += 1
    return physical, files[0].used, files[1].used


@dataclass
class _File:
    """A register file: numbers from `base`, the lowest free one first."""

    base: int
    used: int = 0
    free: list[int] = field(default_factory=list)

    def take(self) -> int:
        if self.free:
            self.free.sort(reverse=True)
            return self.free.pop()
        self.used += 1
        return self.base + self.used - 1
