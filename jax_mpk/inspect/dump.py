"""The listing of a program: every section of the blob as text, codes disassembled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jax_mpk import abi
from jax_mpk.abi import Program


def listing(program: Program) -> str:
    """Header, buffers, operators with their codes, tasks, events and streams, one line a record."""
    return "\n".join(_lines(program))


def _name(enum: str, n: int) -> str:
    members = abi.ENUMS[enum]
    return members[n] if n < len(members) else str(n)


def _ints(row: np.ndarray, n: int) -> str:
    return "[" + " ".join(str(int(x)) for x in row[:n]) + "]"


def _lines(p: Program) -> Iterator[str]:
    h = p.header
    yield (
        f"program version {h['version']}, {h['bytes']} bytes, hash {h['hash'].tobytes().hex()}, key {p.key.hex()}, "
        f"workspace {h['workspace']}, {h['workers']} workers, {h['args']} operands, {h['results']} results"
    )
    yield "sections: " + ", ".join(f"{s} {len(p[s])}" for s in abi.SECTIONS)
    for n, b in enumerate(p["Buffer"]):
        alias = f" in operand {b['alias']}" if b["alias"] >= 0 else ""
        yield (f"buffer {n} {p.name(int(b['name']))}: {_name('Space', b['space'])} {b['index']} "
               f"{_name('Dtype', b['dtype'])} {b['bytes']} bytes at {b['offset']}{alias}")  # fmt: skip
    seen: set[int] = set()
    for n, o in enumerate(p["Op"]):
        axes = int(o["n_axes"])
        yield (f"op {n} {p.name(int(o['name']))}: {_name('Kind', o['kind'])} extent {_ints(o['extent'], axes)} "
               f"tile {_ints(o['tile'], axes)} prologue {o['prologue']} params {_ints(o['params'], 20)}")  # fmt: skip
        for s in range(int(o["slot"]), int(o["slot"]) + int(o["slots"])):
            yield f"  slot {s - int(o['slot'])}: buffer {p['Slot'][s]['buffer']} + {p['Slot'][s]['offset']}"
        for a in range(int(o["access"]), int(o["access"]) + int(o["accesses"])):
            yield f"  {_access(p, a)}"
        for role in range(len(abi.ENUMS["Role"])):
            first, count = int(o["code"][role]), int(o["codes"][role])
            for c in range(first, first + count):
                again = " (above)" if c in seen else ""
                yield f"  {_name('Role', role)}: code {c}{again}"
                if c not in seen:
                    seen.add(c)
                    yield from _code(p, c)
    for n, t in enumerate(p["Task"]):
        waits = " ".join(f"{e}>={w}" for e, w in zip(t["wait"][: t["n_waits"]], t["want"], strict=False))
        triggers = " ".join(str(e) for e in t["trigger"][: t["n_triggers"]])
        yield f"task {n}: op {t['op']} [{t['index']}] worker {t['worker']} waits [{waits}] triggers [{triggers}]"
    for n, s in enumerate(p["Stream"]):
        start, step = _ints(s["start"], 4), _ints(s["step"], 4)
        yield f"stream {n}: task {s['task']} map {s['map']} start {start} step {step} x {s['frames']}"


def _access(p: Program, n: int) -> str:
    a = p["Access"][n]
    slot = int(a["slot"])
    where = f"slot {slot}" if slot < abi.SLOT_ACT else f"scratch {slot - abi.SLOT_ACT:#x}"
    strides = " ".join(f"{int(s)}*i{i}" for i, s in enumerate(a["stride"]) if s)
    dyn = " ".join(
        f"{int(a['dyn_stride'][d])}*clamp({_reg(a['dyn_reg'][d])}, {a['dyn_limit'][d]})" for d in range(a["n_dyn"])
    )
    return f"access {n}: {where} {_name('Dtype', a['dtype'])} {a['offset']} {strides} {dyn}".rstrip()


def _reg(r: int) -> str:
    r = int(r)
    return f"v{r & ~abi.VECTOR_REG}" if r & abi.VECTOR_REG else f"s{r}"


def _code(p: Program, n: int) -> Iterator[str]:
    c = p["Code"][n]
    axes = int(c["n_axes"])
    box = " ".join(f"{lo}..{hi}" for lo, hi in zip(c["lo"][:axes], c["hi"][:axes], strict=True))
    yield f"    axes {int(c['axes']):#b} vector {c['vector']} box {box}"
    for a in range(int(c["access"]), int(c["access"]) + int(c["accesses"])):
        yield f"    {_access(p, a)}"
    for s in range(int(c["stage"]), int(c["stage"]) + int(c["stages"])):
        st = p["Stage"][s]
        extra = ""
        if _name("StageKind", st["kind"]) == "REDUCE":
            k = int(st["axes"])
            over = " ".join(f"i{int(st['axis']) + j} in {st['lo'][j]}..{st['hi'][j]}" for j in range(min(k, 4)))
            extra = f" {_name('ReduceOp', st['reduce'])} over {over}: {_reg(st['src'])} -> s{st['dst']}"
        yield f"    {_name('StageKind', st['kind'])}{extra}"
        for i in range(int(st["first"]), int(st["first"]) + int(st["count"])):
            x = p["Instr"][i]
            yield (f"      {_reg(x['dst'])} = {_name('Opcode', x['op'])} {_reg(x['a'])} {_reg(x['b'])} {_reg(x['c'])} "
                   f"aux {x['aux']} imm {int(x['imm']):#x}")  # fmt: skip
