"""What only a program for a GPU has: parts of tasks and their tickets, what they leave, scratch of the workers, and
prologues that tasks share. (Its streams: `frames`.)

A task of several parts is proven as one task: all its parts wait for the same events before they touch anything, and its
own events fire when the last part has ended it. What order the parts have among themselves is the kind's affair: each
has its slice of what they leave (`share`), and the ticket tells the last one.
"""

from __future__ import annotations

import heapq

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import VerifyError
from jax_mpk.ir.boxes import ragged
from jax_mpk.ir.tasks import UPDATE, TaskGraph
from jax_mpk.verify.codes import Operator, Touch, accesses

_WORKSPACE = abi.enum("Space", "WORKSPACE")


def is_gpu(p: abi.Program) -> bool:
    """Whether the program is for a GPU."""
    return len(p["Kernel"]) > 0


def check_units(p: abi.Program) -> None:
    """Kernel and units fit each other and the operators: tickets, scratch, names of the same operands."""
    if len(p["Kernel"]) != 1 or len(p["Unit"]) != len(p["Op"]):
        raise VerifyError(f"{len(p['Kernel'])} kernels and {len(p['Unit'])} units for {len(p['Op'])} operators")
    kernel, units = p["Kernel"][0], p["Unit"]
    for f in ("slot", "slots", "name", "prologue"):
        for n in np.flatnonzero(units[f] != p["Op"][f])[:1]:
            raise VerifyError(f"unit {n} has {f} {units[f][n]}, its operator {p['Op'][f][n]}")
    taken: list[tuple[int, int, str]] = []
    for n in np.flatnonzero(units["parts"] != 1).tolist():
        u, name = units[n], p.name(int(units[n]["name"]))
        if u["parts"] < 1 or abi.ENUMS["Kind"][int(p["Op"][n]["kind"])] != "ATTENTION":
            raise VerifyError(f"operator {name} has {u['parts']} parts a task")
        taken.append((int(u["ticket"]), int(u["ticket"]) + _count(p["Op"][n]), name))
    for a, b in zip(sorted(taken), sorted(taken)[1:], strict=False):
        if b[0] < a[1]:
            raise VerifyError(f"operators {a[2]} and {b[2]} share tickets")
    if max((t[1] for t in taken), default=0) > kernel["tickets"]:
        raise VerifyError(f"tickets beyond the {kernel['tickets']} that there are")
    buffers, at = p["Buffer"], int(kernel["spill_at"])
    ends = (buffers["offset"] + buffers["bytes"])[buffers["space"] == _WORKSPACE]
    if int(ends.max(initial=0)) > at:
        raise VerifyError(f"the scratch of the workers begins at byte {at}, inside of a buffer")
    end = at + int(kernel["spill"]) * int(p.header["workers"]) + int(kernel["profile"])
    if end > p.header["workspace"]:
        raise VerifyError(f"the scratch of the workers ends at byte {end} of {p.header['workspace']}")


def _count(op: np.void) -> int:
    n = int(op["n_axes"])
    return int(np.prod(-(-op["extent"][:n].astype(np.int64) // op["tile"][:n])))


def share(p: abi.Program, n: int, rows: int, columns: int) -> tuple[int, int]:
    """The buffer in which the tasks of operator `n` leave what their parts computed, and bytes a task; (-1, 0) if they
    have one part. A part leaves the sums of `rows` times `columns`, a maximum and a sum a row."""
    u, name = p["Unit"][n], p.name(int(p["Unit"][n]["name"]))
    if u["parts"] == 1:
        return -1, 0
    need = int(u["parts"]) * rows * (columns + 2) * 4
    b = p["Buffer"][int(u["buffer"])] if u["buffer"] < len(p["Buffer"]) else None
    if b is None or b["space"] != _WORKSPACE or b["offset"] != u["partial"] or u["share"] != need:
        raise VerifyError(f"operator {name}: its parts leave {need} bytes a task, of which there are {u['share']} in buffer "
                          f"{u['buffer']}")  # fmt: skip
    return int(u["buffer"]), need


def check_appends(p: abi.Program, x: Operator) -> None:
    """Every part of a task appends for itself, so that none waits for another. This is right if an append leaves the same
    however often it runs: it combines with nothing, and loads nothing that an append of the task stores."""
    slots = p["Slot"][int(x.op["slot"]) : int(x.op["slot"] + x.op["slots"])]
    loads: list[tuple[tuple[str, int], int, int]] = []
    stores: list[tuple[tuple[str, int], int, int]] = []
    for role in (name for name in abi.ENUMS["Role"] if name.startswith("APPEND")):
        for how, a, _ in accesses(x, role):
            if how not in ("", "set", "where"):
                x.fail(f"its parts append one after the other, and {role} combines ({how}) with what is there")
            if a["slot"] >= len(slots):
                x.fail(f"{role} uses slot {a['slot']} of {len(slots)}")
            (stores if how else loads).append(_memory_of(p["Buffer"][int(slots["buffer"][a["slot"]])]))
    for space, lo, hi in loads:
        if any(space == s and lo < end and at < hi for s, at, end in stores):
            x.fail("its parts append one after the other, and an append loads from memory that an append stores to")


def _memory_of(b: np.void) -> tuple[tuple[str, int], int, int]:
    """(space, first byte, end) such that buffers that share memory overlap: a result may live in an operand's buffer."""
    space, number = abi.ENUMS["Space"][int(b["space"])], int(b["index"])
    if space in ("WORKSPACE", "CONST"):
        return (space, 0), int(b["offset"]), int(b["offset"] + b["bytes"])
    if space == "RESULT" and b["alias"] >= 0:
        space, number = "ARG", int(b["alias"])
    return (space, number), 0, int(b["bytes"])


def parts(p: abi.Program, number: np.ndarray) -> np.ndarray:
    """The records of first parts. Every other part has a record of its own, which waits and triggers alike."""
    t = p["Task"]
    count = p["Unit"]["parts"][t["op"]].astype(np.int64)
    if (np.diff(t["worker"].astype(np.int64)) < 0).any():
        raise VerifyError("the task records are not sorted by worker")
    for r in np.flatnonzero(t["part"] >= count)[:1]:
        raise VerifyError(f"task record {r} is part {t['part'][r]} of {count[r]}")
    key = number * (int(count.max(initial=1)) + 1) + t["part"]
    if len(np.unique(key)) != len(key):
        raise VerifyError("a part of a task has two records")
    first = np.flatnonzero(t["part"] == 0)
    of = np.full(int(number.max(initial=-1)) + 1, -1, np.int64)
    of[number[first]] = first
    for r in np.flatnonzero(of[number] < 0)[:1]:
        raise VerifyError(f"task record {r} is a part of a task without a first part")
    for r in np.flatnonzero(np.bincount(number, minlength=len(of))[number] != count)[:1]:
        raise VerifyError(f"task record {r} belongs to a task that does not have all of its {count[r]} parts")
    for f in ("n_waits", "n_triggers", "wait", "want", "trigger"):
        same = t[f] == t[f][of[number]]
        for r in np.flatnonzero(~(same if same.ndim == 1 else same.all(1)))[:1]:
            raise VerifyError(f"task record {r} does not {'wait' if f in ('n_waits', 'wait', 'want') else 'trigger'} as the "
                              "first part of its task does")  # fmt: skip
    return first


def order(p: abi.Program, number: np.ndarray, tasks: int) -> np.ndarray:
    """A linear order of the tasks in which every worker keeps the order of its records, and every task comes after those
    whose events it waits for. That there is one means that no order of arrivals can block."""
    t = p["Task"]
    ready = [0] * tasks  # what a task still waits for
    after: list[list[int]] = [[] for _ in range(tasks)]
    chain = np.flatnonzero((np.diff(t["worker"].astype(np.int64)) == 0) & (np.diff(number) != 0))
    for a, b in zip(number[chain].tolist(), number[chain + 1].tolist(), strict=True):
        after[a].append(b)
        ready[b] += 1
    left = p["Event"]["threshold"].tolist()
    wake: list[list[int]] = [[] for _ in left]
    fires: list[list[int]] = [[] for _ in range(tasks)]
    first = t["part"] == 0
    for count, event in (("n_waits", "wait"), ("n_triggers", "trigger")):
        row, at = ragged(np.zeros(int(first.sum()), np.int64), t[count][first].astype(np.int64))
        for n, e in zip(number[first][row].tolist(), t[event][first][row, at].tolist(), strict=True):
            if event == "wait":
                wake[e].append(n)
                ready[n] += 1
            else:
                fires[n].append(e)
    heap = [n for n in range(tasks) if not ready[n]]
    out = []

    def release(n: int) -> None:
        ready[n] -= 1
        if not ready[n]:
            heapq.heappush(heap, n)

    while heap:
        n = heapq.heappop(heap)
        out.append(n)
        for b in after[n]:
            release(b)
        for e in fires[n]:
            left[e] -= 1
            if not left[e]:
                for b in wake[e]:
                    release(b)
    if len(out) < tasks:
        stuck = next(n for n in range(tasks) if ready[n] > 0)
        op = int(t["op"][np.flatnonzero(number == stuck)[0]])
        name = p.name(int(p["Op"][op]["name"]))
        raise VerifyError(
            f"deadlock: {tasks - len(out)} tasks can never start, the first of them task {stuck} ({name})"
        )
    return np.array(out, np.int64)


def check_prologues(p: abi.Program, tg: TaskGraph, touched: dict[int, list[Touch]]) -> None:
    """Operators with equal prologues have equal activations whenever a worker may keep one: the same codes over the same
    operands, tiles and rows, and nothing that they read changes while the program runs."""
    ops, slots = p["Op"], p["Slot"]
    changing = set(tg.boxes.buffer[tg.boxes.mode == UPDATE].tolist())
    groups: dict[int, list[int]] = {}
    for n in np.flatnonzero(ops["prologue"]).tolist():
        groups.setdefault(int(ops["prologue"][n]), []).append(n)
    for group in groups.values():
        for n in group:
            x = Operator(p, ops[n], p.name(int(ops[n]["name"])))
            if x.kind != "CONTRACT":
                x.fail("only contractions share prologues")
            one = ops[group[0]]
            batch, m, k = x.param("N_BATCH"), x.param("N_M"), x.param("N_K")
            y = Operator(p, one, p.name(int(one["name"])))
            if (batch, m, k) != (y.param("N_BATCH"), y.param("N_M"), y.param("N_K")) or x.codes("LHS") != y.codes(
                "LHS"
            ):
                x.fail(f"it has the prologue of {y.name}, and other codes")
            for axes, other in (
                (range(batch + m), range(batch + m)),
                (range(x.axes - k, x.axes), range(y.axes - k, y.axes)),
            ):
                if [(x.extent[a], x.tile[a]) for a in axes] != [(y.extent[a], y.tile[a]) for a in other]:
                    x.fail(f"it has the prologue of {y.name}, and other rows")
            for s in {t.slot for t in touched[n]}:
                a, b = slots[int(ops[n]["slot"]) + s], slots[int(one["slot"]) + s]
                if (a["buffer"], a["offset"]) != (b["buffer"], b["offset"]):
                    x.fail(f"it has the prologue of {y.name}, and other operands")
                if len(group) > 1 and int(a["buffer"]) in changing:
                    x.fail(f"it shares a prologue that reads buffer {a['buffer']}, which is updated in place")
