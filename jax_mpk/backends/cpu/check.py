"""Sanity of a program: every number points at something. A program that fails is a compiler bug.

What is refused here the executor's loader refuses too (`ffi/cpu/program.h`), which knows more: addresses, sizes and what
each kind relies on. One thing only the compiler owes: an event that is triggered as often as it is waited for.
"""

from __future__ import annotations

import numpy as np

from jax_mpk import abi
from jax_mpk.abi import Program, ProgramError

MEMORY = frozenset(abi.enum("Opcode", name) for name in ("LOAD", "STORE", "STORE_IF", *abi.COMBINES.values()))
STORES = MEMORY - {abi.enum("Opcode", "LOAD")}
INDEX = abi.enum("Opcode", "INDEX")
SCALAR, REDUCE = abi.enum("StageKind", "SCALAR"), abi.enum("StageKind", "REDUCE")
POSITIONS = frozenset((abi.enum("ReduceOp", "ARGMAX"), abi.enum("ReduceOp", "ARGMIN")))


def check(program: bytes | Program) -> Program:
    """Decodes the program and verifies its tables; raises `ProgramError`."""
    p = abi.decode(program) if isinstance(program, bytes) else program
    for n, s in enumerate(p["Slot"]):
        _need(s["buffer"] < len(p["Buffer"]), f"slot {n} binds a buffer that is not there")
        _need(0 <= s["offset"] <= p["Buffer"][s["buffer"]]["bytes"], f"slot {n} starts outside of its buffer")
    for n, b in enumerate(p["Buffer"]):
        p.name(int(b["name"]))
        _need(b["space"] < len(abi.ENUMS["Space"]), f"buffer {n} has space {b['space']}")
        space = abi.ENUMS["Space"][b["space"]]
        room = {"WORKSPACE": int(p.header["workspace"]), "CONST": len(p["Const"])}.get(space)
        _need(room is None or int(b["offset"]) + int(b["bytes"]) <= room, f"buffer {n} does not fit its section")
    seen: set[tuple[int, int, int]] = set()
    for n, op in enumerate(p["Op"]):
        where = f"operator {n} ({p.name(int(op['name']))})"
        axes, slots = int(op["n_axes"]), int(op["slots"])
        _need(axes <= abi.MAX_AXES, f"{where} has {axes} axes")
        _need(int(op["slot"]) + slots <= len(p["Slot"]), f"{where} has slots beyond the section")
        _need(int(op["access"]) + int(op["accesses"]) <= len(p["Access"]), f"{where} has accesses beyond the section")
        _need(bool((op["tile"][:axes] >= 1).all()), f"{where} has an empty tile")
        for a in p["Access"][op["access"] : op["access"] + op["accesses"]]:
            _need(a["slot"] < op["slots"] and not a["n_dyn"], f"{where} has a core access without a slot")
        for role in range(len(abi.ENUMS["Role"])):
            first, count = int(op["code"][role]), int(op["codes"][role])
            _need(not count or first + count <= len(p["Code"]), f"{where} has codes beyond the section")
            for c in range(first, first + count):
                if (c, slots, axes) not in seen:
                    seen.add((c, slots, axes))
                    _Code(p, c, op, where).check()
    _events(p)
    return p


def _events(p: Program) -> None:
    tasks, threshold = p["Task"], p["Event"]["threshold"]
    _need(bool((tasks["op"] < len(p["Op"])).all()), "a task of an operator that is not there")
    used = {}
    for name, count in (("wait", "n_waits"), ("trigger", "n_triggers")):
        _need(bool((tasks[count] <= tasks[name].shape[1]).all()), f"a task with too many {name}s")
        used[name] = np.arange(tasks[name].shape[1]) < tasks[count][:, None]
        _need(bool((tasks[name][used[name]] < len(threshold)).all()), f"a {name} for an event that is not there")
    wants = tasks["want"][used["wait"]] == threshold[tasks["wait"][used["wait"]]]
    _need(bool(wants.all()), "a task that waits for something else than the threshold of its event")
    fired = np.bincount(tasks["trigger"][used["trigger"]], minlength=len(threshold))
    _need(bool((fired <= threshold).all()), "an event that is triggered more often than its threshold")
    _need(bool((fired >= threshold).all()), "an event that is triggered less often than its threshold")


class _Code:
    """A code, as one operator runs it."""

    def __init__(self, p: Program, number: int, op: np.void, where: str):
        self.p, self.op, self.code, self.where = p, op, p["Code"][number], f"{where}, code {number}"
        self.limit = {False: int(self.code["scalar_regs"]), True: int(self.code["vector_regs"])}
        self.valued: dict[bool, set[int]] = {False: set(), True: set()}  # by file

    def need(self, ok: bool, message: str) -> None:
        _need(ok, f"{self.where}: {message}")

    def check(self) -> None:
        p, code, axes = self.p, self.code, int(self.op["n_axes"])
        self.need(code["n_axes"] == axes, f"{code['n_axes']} axes")
        self.need(not int(code["axes"]) >> axes, "loops over an axis that is not there")
        vector = int(code["vector"])
        self.need(-1 <= vector < axes, "a vector axis that is not there")
        self.need(vector < 0 or bool(int(code["axes"]) >> vector & 1), "no loop over the vector axis")
        self.need(max(self.limit.values()) <= abi.MAX_REGS, "too many registers")
        loops = [a for a in range(axes) if int(code["axes"]) >> a & 1]
        self.need(bool((code["lo"][loops] >= 0).all() and (code["hi"][loops] >= 0).all()), "a negative range")
        end = int(code["access"]) + int(code["accesses"])
        self.need(end <= len(p["Access"]), "accesses beyond the section")
        self.need(int(code["stage"]) + int(code["stages"]) <= len(p["Stage"]), "stages beyond the section")
        if (np.minimum(code["hi"], self.op["extent"])[loops] <= code["lo"][loops]).any():
            return  # it never runs
        self.accesses = p["Access"][code["access"] : end]
        for a in self.accesses:
            self.need(a["slot"] >= abi.SLOT_ACT or a["slot"] < self.op["slots"], "a slot that is not bound")
        for stage in p["Stage"][code["stage"] : code["stage"] + code["stages"]]:
            self.stage(stage)

    def stage(self, s: np.void) -> None:
        self.need(s["kind"] < len(abi.ENUMS["StageKind"]), f"a stage of kind {s['kind']}")
        self.need(int(s["first"]) + int(s["count"]) <= len(self.p["Instr"]), "instructions beyond the section")
        self.valued[True] = set()
        points = s["kind"] != REDUCE or bool((s["hi"] > s["lo"])[: s["axes"]].all())
        for i in self.p["Instr"][s["first"] : s["first"] + s["count"]] if points else ():
            self.instr(i, vector=s["kind"] != SCALAR)
        if s["kind"] == REDUCE:
            if points:
                self.read(int(s["src"]))
            if s["flags"] & abi.ACCUMULATE and int(s["reduce"]) not in POSITIONS:
                self.read(int(s["dst"]))
            self.need(not s["dst"] & abi.VECTOR_REG, "a reduction to a vector register")
            self.write(int(s["dst"]))

    def instr(self, i: np.void, vector: bool) -> None:
        op = int(i["op"])
        self.need(op < len(abi.ARITY), f"opcode {op}")
        sources = [int(i[f]) for f in "abc"[: abi.ARITY[op]]]
        if op in MEMORY or op == INDEX:
            self.need(i["aux"] < len(self.accesses), "an access that is not there")
            a = self.accesses[i["aux"]]
            if op in MEMORY:
                self.need(a["n_dyn"] <= abi.MAX_DYN, f"{a['n_dyn']} dynamic coordinates")
                sources += [int(r) for r in a["dyn_reg"][: a["n_dyn"]]]
        for r in sources:
            self.need(vector or not r & abi.VECTOR_REG, "a vector register in a scalar stage")
            self.read(r)
        if op not in STORES:
            name = abi.ENUMS["Opcode"][op]
            self.need(bool(i["dst"] & abi.VECTOR_REG) == vector, f"{name} writes the wrong register file")
            self.write(int(i["dst"]))

    def read(self, r: int) -> None:
        self.bound(r)
        file = bool(r & abi.VECTOR_REG)
        self.need(r & ~abi.VECTOR_REG in self.valued[file], f"register {r:#x} is read before it has a value")

    def write(self, r: int) -> None:
        self.bound(r)
        self.valued[bool(r & abi.VECTOR_REG)].add(r & ~abi.VECTOR_REG)

    def bound(self, r: int) -> None:
        self.need(r & ~abi.VECTOR_REG < self.limit[bool(r & abi.VECTOR_REG)], f"register {r:#x} is not there")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ProgramError(message)
