"""The proof is about the codes that run: programs whose codes are damaged are rejected, whatever the task graph says."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import abi, compiler, device
from jax_mpk.errors import VerifyError
from jax_mpk.options import Options
from jax_mpk.verify import verify
from tests import vm
from tests.functions import CASES, TASKS, data

FUNCTIONS = CASES | TASKS
STORES = [abi.enum("Opcode", x) for x in ("STORE", "STORE_IF", *abi.COMBINES.values())]
LOAD = abi.enum("Opcode", "LOAD")
Sections = dict[str, np.ndarray]


def program(f: Callable, *args: object, target: device.Device = device.CPU) -> bytes:
    blob = compiler.compile(jax.make_jaxpr(f)(*args), target, Options(cache_entries=0)).program
    assert blob is not None
    return blob


def rebuilt(blob: bytes, change: Callable[[Sections], bool]) -> bytes | None:
    """The blob with its sections changed and a new hash; None if there was nothing to change."""
    p = abi.decode(blob)
    sections = {name: rows.copy() for name, rows in p.sections.items()}
    if not change(sections):
        return None
    return abi.encode(sections, **p.settings)


def stored_accesses(s: Sections) -> list[int]:
    """The accesses to memory that codes store through."""
    out = []
    for c in s["Code"]:
        for st in s["Stage"][c["stage"] : c["stage"] + c["stages"]]:
            for i in s["Instr"][st["first"] : st["first"] + st["count"]]:
                if i["op"] in STORES and s["Access"][c["access"] + i["aux"]]["slot"] < abi.SLOT_ACT:
                    out.append(int(c["access"] + i["aux"]))
    return list(dict.fromkeys(out))


def shorter_code(s: Sections) -> bool:
    """A code ends one step early: a hole in what it stores."""
    for c in s["Code"]:
        for a in range(int(c["n_axes"])):
            if c["axes"] >> a & 1 and c["hi"][a] > c["lo"][a] + 1:
                c["hi"][a] -= 1
                return True
    return False


def without_a_code(s: Sections) -> bool:
    for op in s["Op"]:
        for r in range(len(op["codes"])):
            if op["codes"][r] > 1:
                op["codes"][r] -= 1
                return True
    return False


def a_code_twice(s: Sections) -> bool:
    for op in s["Op"]:
        for r in range(len(op["codes"])):
            if op["codes"][r] > 1:
                s["Code"][op["code"][r] + 1] = s["Code"][op["code"][r]]
                return True
    return False


def moved_store(s: Sections) -> bool:
    for a in stored_accesses(s):
        s["Access"][a]["offset"] += 1
        return True
    return False


def shared_stride(s: Sections) -> bool:
    """Two indices of an axis write one element."""
    stored = s["Access"]["stride"][stored_accesses(s)]
    for axis in range(abi.MAX_AXES):
        if (stored[:, axis] > 1).any():
            stored[:, axis] -= stored[:, axis] > 1
            s["Access"]["stride"][stored_accesses(s)] = stored
            return True
    return False


def load_beyond(s: Sections) -> bool:
    """A load at the end of its buffer goes on."""
    loads = {int(c["access"] + i["aux"]) for c in s["Code"] for st in s["Stage"][c["stage"] : c["stage"] + c["stages"]]
             for i in s["Instr"][st["first"] : st["first"] + st["count"]] if i["op"] == LOAD}  # fmt: skip
    for a in sorted(loads):
        if s["Access"][a]["slot"] < abi.SLOT_ACT:
            s["Access"][a]["offset"] += 1 << 20
            return True
    return False


def no_store(s: Sections) -> bool:
    for i in s["Instr"]:
        if i["op"] == STORES[0]:
            i["op"] = abi.enum("Opcode", "MOVE")
            i["dst"] = i["a"]
            return True
    return False


def core_elsewhere(s: Sections) -> bool:
    """An operand of a contraction that does not lie as the core walks it."""
    for op in s["Op"]:
        if op["kind"] == abi.enum("Kind", "CONTRACT"):
            a = s["Access"][op["access"]]
            k = int(op["n_axes"]) - 1
            if op["extent"][k] > 1 and a["stride"][k]:
                a["stride"][k] += 10**6
                return True
    return False


def other_buffer(s: Sections) -> bool:
    """A result is written to another buffer."""
    buffers, result = s["Buffer"], abi.enum("Space", "RESULT")
    for slot in s["Slot"]:
        if buffers[slot["buffer"]]["space"] == result:
            for n, b in enumerate(buffers):
                if b["space"] != result and n != slot["buffer"] and b["bytes"] >= buffers[slot["buffer"]]["bytes"]:
                    slot["buffer"] = n
                    return True
    return False


def lost_task(s: Sections) -> bool:
    if len(s["Task"]) < 2 or s["Task"][0]["op"] != s["Task"][1]["op"]:
        return False
    s["Task"][1]["index"] = s["Task"][0]["index"]
    return True


def other_target(s: Sections) -> bool:
    """A task waits for fewer triggers than the event has."""
    for t in s["Task"]:
        if t["n_waits"]:
            t["want"][0] += 1
            return True
    return False


def in_place_denied(s: Sections) -> bool:
    """An update at a constant place that claims to write fresh memory."""
    for op in s["Op"]:
        if op["flags"] & abi.IN_PLACE:
            op["flags"] = 0
            return True
    return False


DAMAGES = [shorter_code, without_a_code, a_code_twice, moved_store, shared_stride, load_beyond, no_store, core_elsewhere,
           other_buffer, lost_task, other_target]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_codes_are_rejected(damage):
    """On every function that the damage applies to. Updates are left out: they may store less, or elsewhere in bounds, and
    still be sound programs. So may a padded copy of which a convolution does not read all, and rows of no group, which are
    masked on both sides: what is accepted must then give what it gave, with poison everywhere."""
    applied, accepted, sound = 0, [], 0
    for name, (f, args) in FUNCTIONS.items():
        blob = program(f, *args)
        if any(op["flags"] & abi.IN_PLACE or op["codes"][abi.enum("Role", "APPEND0")] for op in abi.decode(blob)["Op"]):
            continue
        damaged = rebuilt(blob, damage)
        if damaged is None:
            continue
        applied += 1
        try:
            verify(damaged, target=device.CPU)
            same = zip(vm.run(blob, jax.tree.leaves(args)), vm.run(damaged, jax.tree.leaves(args)), strict=True)
            accepted += [] if all(np.array_equal(x, y) for x, y in same) else [name]
            sound += 1
        except VerifyError:
            pass
    assert applied >= 3 and not accepted and sound <= 2


def test_an_update_of_what_was_written_must_say_so():
    f, args = CASES["update at a constant place"]
    blob = rebuilt(program(f, *args), in_place_denied)
    assert blob is not None
    with pytest.raises(VerifyError, match="of which every byte is to be written once"):
        verify(blob)


def test_every_program_is_accepted():
    for f, args in FUNCTIONS.values():
        assert verify(program(f, *args), target=device.CPU).tasks
    assert verify(program(*CASES["norm, two matmuls"][:1], *CASES["norm, two matmuls"][1], target=device.H100)).tasks


def test_a_blob_that_is_no_program():
    with pytest.raises(VerifyError, match="not a program"):
        verify(b"nonsense")


def test_a_gap_between_pieces_names_its_bytes():
    """What the compiler once made of padding with interior: the last piece of a result was nobody's."""

    def f(x):
        return jnp.concatenate([x, x * 2]) + 1

    blob = rebuilt(program(f, data(6)), without_a_code)
    assert blob is not None
    with pytest.raises(VerifyError, match=r"bytes \[24, 48\) of buffer 1 .* \(result 0\) are written by no task"):
        verify(blob)
