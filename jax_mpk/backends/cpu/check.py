"""Sanity of a program: every number points at something. A program that fails is a compiler bug."""

from __future__ import annotations

import numpy as np

from jax_mpk import abi
from jax_mpk.abi import Program, ProgramError

_SRCS = {"CONST": 0, "INDEX": 0, "LOAD": 0, "STORE": 1, "STORE_IF": 2, "STORE_ADD": 2, "MOVE": 1, "SELECT": 3}
_UNARY_END = abi.enum("Opcode", "F_TO_B")
_INT_UNARY = range(abi.enum("Opcode", "I_NEG"), abi.enum("Opcode", "I_WRAP_U16") + 1)


def arity(op: int) -> int:
    """How many register operands an instruction reads."""
    name = abi.ENUMS["Opcode"][op]
    return _SRCS.get(name, 1 if op <= _UNARY_END or op in _INT_UNARY else 2)


def check(program: bytes | Program) -> Program:
    """Decodes the program and verifies its tables; raises `ProgramError`."""
    p = abi.decode(program) if isinstance(program, bytes) else program
    for n, s in enumerate(p["Slot"]):
        _need(s["buffer"] < len(p["Buffer"]), f"slot {n} binds a buffer that is not there")
        _need(0 <= s["offset"] <= p["Buffer"][s["buffer"]]["bytes"], f"slot {n} starts outside of its buffer")
    for n, b in enumerate(p["Buffer"]):
        space = abi.ENUMS["Space"][b["space"]]
        room = {"WORKSPACE": int(p.header["workspace"]), "CONST": len(p["Const"])}.get(space)
        _need(room is None or int(b["offset"]) + int(b["bytes"]) <= room, f"buffer {n} does not fit its section")
    seen: set[tuple[int, int]] = set()
    for n, op in enumerate(p["Op"]):
        where = f"operator {n} ({p.name(int(op['name']))})"
        _need(op["n_axes"] <= abi.MAX_AXES, f"{where} has {op['n_axes']} axes")
        _need(op["slot"] + op["slots"] <= len(p["Slot"]), f"{where} has slots beyond the section")
        axes = int(op["n_axes"])
        _need(bool((op["tile"][:axes] >= 1).all()), f"{where} has an empty tile")
        for a in p["Access"][op["access"] : op["access"] + op["accesses"]]:
            _need(a["slot"] < op["slots"] and not a["n_dyn"], f"{where} has a core access without a slot")
        for first, count in zip(op["code"], op["codes"], strict=True):
            _need(first + count <= len(p["Code"]), f"{where} has codes beyond the section")
            for c in range(first, first + count):
                if (c, int(op["slots"])) not in seen:
                    seen.add((c, int(op["slots"])))
                    _code(p, c, op, where)
    tasks = p["Task"]
    if len(tasks):
        _need(bool((tasks["op"] < len(p["Op"])).all()), "a task of an operator that is not there")
        for list_, count in (("wait", "n_waits"), ("trigger", "n_triggers")):
            used = np.arange(tasks[list_].shape[1]) < tasks[count][:, None]
            _need(bool((tasks[list_][used] < len(p["Event"])).all()), f"a {list_} for an event that is not there")
        fired = np.bincount(tasks["trigger"][np.arange(abi.MAX_TRIGGERS) < tasks["n_triggers"][:, None]],
                            minlength=len(p["Event"]))  # fmt: skip
        _need(bool((fired == p["Event"]["threshold"]).all()), "an event whose threshold is not its number of triggers")
    return p


def _code(p: Program, c: int, op: np.void, where: str) -> None:
    code = p["Code"][c]
    where = f"{where}, code {c}"
    _need(code["n_axes"] == op["n_axes"], f"{where} counts {code['n_axes']} axes")
    _need(code["vector"] < 0 or code["axes"] >> code["vector"] & 1, f"{where} does not loop over its vector axis")
    _need(max(code["scalar_regs"], code["vector_regs"]) <= abi.MAX_REGS, f"{where} has too many registers")
    regs = (int(code["scalar_regs"]), int(code["vector_regs"]))
    accesses = p["Access"][code["access"] : code["access"] + code["accesses"]]
    _need(len(accesses) == code["accesses"], f"{where} has accesses beyond the section")
    for a in accesses:
        _need(a["slot"] >= abi.SLOT_ACT or a["slot"] < max(1, op["slots"]), f"{where} uses a slot that is not bound")
    for stage in p["Stage"][code["stage"] : code["stage"] + code["stages"]]:
        vector = stage["kind"] != abi.enum("StageKind", "SCALAR")
        for i in p["Instr"][stage["first"] : stage["first"] + stage["count"]]:
            used = [int(i[f]) for f in "abc"[: arity(int(i["op"]))]]
            name = abi.ENUMS["Opcode"][i["op"]]
            if not name.startswith("STORE"):
                _need(bool(i["dst"] & abi.VECTOR_REG) == vector, f"{where}: {name} writes the wrong register file")
                used.append(int(i["dst"]))
            if name in ("LOAD", "INDEX") or name.startswith("STORE"):
                _need(i["aux"] < len(accesses), f"{where}: {name} with an access that is not there")
                a = accesses[i["aux"]]
                used += [int(r) for r in a["dyn_reg"][: a["n_dyn"]]]
            for r in used:
                _need(vector or not r & abi.VECTOR_REG, f"{where}: {name} uses a vector register in a scalar stage")
                _need((r & ~abi.VECTOR_REG) < regs[r >= abi.VECTOR_REG], f"{where}: {name} uses register {r:#x}")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ProgramError(message)
