"""Damaged programs of a GPU: parts, tickets, what parts leave, scratch, streams, shared prologues, assignment. None may pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.decoders import Shape, laid_out, on_host
from jax_mpk import abi
from jax_mpk.device import H100
from jax_mpk.errors import VerifyError
from jax_mpk.verify import verify
from tests.unit.test_verify_codes import Sections, program, rebuilt

Damage = Callable[[Sections, int], None]


def decoder(**layout: bool) -> bytes:
    shape = Shape(2, 256, 4, 2, 64, 512, 512, slots=512)
    step, args = laid_out(shape, 1, jnp.bfloat16, layout, 400, on_host(0))
    return program(step, *args, target=H100)


@pytest.fixture(scope="module")
def blob() -> bytes:
    return decoder()


def split(s: Sections) -> np.ndarray:
    """The operators whose tasks have parts."""
    return np.flatnonzero(s["Unit"]["parts"] > 1)


def of_parts(s: Sections) -> np.ndarray:
    """The task records of parts."""
    return np.flatnonzero(np.isin(s["Task"]["op"], split(s)))


def shared(s: Sections) -> list[np.ndarray]:
    """Groups of operators with one prologue."""
    number = s["Op"]["prologue"]
    return [np.flatnonzero(number == n) for n in np.unique(number[number > 0]) if (number == n).sum() > 1]


def entries(s: Sections) -> np.ndarray:
    return np.arange(len(s["Stream"]))


# name -> (which records may be damaged, the damage to one of them)
DAMAGES: dict[str, tuple[Callable[[Sections], object], Damage]] = {}


def damage(where: Callable[[Sections], object]) -> Callable[[Damage], Damage]:
    def register(f: Damage) -> Damage:
        DAMAGES[f.__name__] = where, f
        return f

    return register


@damage(split)
def one_part_more(s, n):
    s["Unit"]["parts"][n] += 1


@damage(split)
def one_part_less(s, n):
    s["Unit"]["parts"][n] -= 1


@damage(of_parts)
def a_part_is_missing(s, n):
    s["Task"] = np.delete(s["Task"], n)
    s["Stream"]["task"] -= s["Stream"]["task"] > n


@damage(of_parts)
def a_part_comes_twice(s, n):
    t = s["Task"]
    others = np.flatnonzero((t["op"] == t["op"][n]) & (t["index"] == t["index"][n]) & (t["part"] != t["part"][n]))
    t["part"][n] = t["part"][others[0]]


@damage(of_parts)
def a_part_waits_for_less(s, n):
    s["Task"]["n_waits"][n] -= 1


@damage(of_parts)
def a_part_triggers_less(s, n):
    s["Task"]["n_triggers"][n] -= 1


@damage(of_parts)
def a_part_of_another_task(s, n):
    s["Task"]["index"][n] ^= 1


def appending(s: Sections) -> list[tuple[int, int, int]]:
    """(operator, a load, a store): instructions of the first append of operators of parts."""
    role = abi.enum("Role", "APPEND0")
    found = []
    for n in split(s):
        code = s["Code"][int(s["Op"]["code"][n][role])]
        stages = s["Stage"][int(code["stage"]) : int(code["stage"] + code["stages"])]
        at = np.concatenate([np.arange(x["first"], x["first"] + x["count"]) for x in stages])
        ops = s["Instr"]["op"][at]
        loads, stores = at[ops == abi.enum("Opcode", "LOAD")], at[ops == abi.enum("Opcode", "STORE")]
        if len(loads) and len(stores):
            found.append((int(n), int(loads[0]), int(stores[0])))
    return found


@damage(lambda s: range(len(appending(s))))
def a_part_adds_to_the_cache(s, n):
    s["Instr"]["op"][appending(s)[n][2]] = abi.enum("Opcode", "STORE_ADD")


@damage(lambda s: range(len(appending(s))))
def a_part_appends_what_it_appended(s, n):
    op, load, store = appending(s)[n]
    s["Instr"]["aux"][load] = s["Instr"]["aux"][store]


@damage(lambda s: split(s)[1:])
def tickets_of_another_operator(s, n):
    s["Unit"]["ticket"][n] = s["Unit"]["ticket"][split(s)[0]]


@damage(lambda s: [0])
def too_few_tickets(s, n):
    s["Kernel"]["tickets"] -= 1


@damage(split)
def partial_sums_elsewhere(s, n):
    s["Unit"]["partial"][n] += 4


@damage(split)
def partial_sums_in_another_buffer(s, n):
    mine = s["Unit"]["buffer"][n]
    space = s["Buffer"]["space"]
    other = [b for b in range(len(s["Buffer"])) if b != mine and space[b] == space[mine]]
    s["Unit"]["buffer"][n] = other[0]


@damage(split)
def less_room_for_partial_sums(s, n):
    s["Unit"]["share"][n] -= 4


@damage(lambda s: [0])
def scratch_inside_a_buffer(s, n):
    s["Kernel"]["spill_at"] -= 256


@damage(lambda s: [0])
def scratch_beyond_the_workspace(s, n):
    s["Kernel"]["spill"] += 1 << 20


@damage(entries)
def a_frame_less(s, n):
    s["Stream"]["frames"][n] -= 1


@damage(entries)
def frames_of_other_columns(s, n):
    s["Stream"]["start"][n][np.flatnonzero(s["Stream"]["step"][n] == 0)[0]] += 64


@damage(entries)
def frames_of_other_k(s, n):
    s["Stream"]["start"][n][np.flatnonzero(s["Stream"]["step"][n])[0]] += 1


@damage(entries)
def frames_that_stand_still(s, n):
    s["Stream"]["step"][n] = 0


@damage(lambda s: entries(s) if len(s["TensorMap"]) > 1 else [])
def frames_of_another_map(s, n):
    s["Stream"]["map"][n] = (s["Stream"]["map"][n] + 1) % len(s["TensorMap"])


@damage(entries)
def an_entry_is_missing(s, n):
    s["Stream"] = np.delete(s["Stream"], n)


@damage(entries)
def an_entry_of_another_task(s, n):
    s["Stream"]["task"][n] = (s["Stream"]["task"][n] + 1) % len(s["Task"])


@damage(entries)
def an_entry_on_another_worker(s, n):
    s["Stream"]["worker"][n] = (s["Stream"]["worker"][n] + 1) % H100.workers


@damage(lambda s: range(len(s["TensorMap"])))
def a_map_of_another_buffer(s, n):
    s["TensorMap"]["buffer"][n] = (s["TensorMap"]["buffer"][n] + 1) % len(s["Buffer"])


@damage(lambda s: range(len(s["TensorMap"])))
def a_map_that_starts_later(s, n):
    s["TensorMap"]["offset"][n] += 16


@damage(lambda s: range(len(s["TensorMap"])))
def a_map_of_longer_rows(s, n):
    s["TensorMap"]["strides"][n][1] += 16


@damage(lambda s: np.flatnonzero(s["Unit"]["flags"] & abi.STREAMED))
def a_stream_that_nobody_takes(s, n):
    s["Unit"]["flags"][n] &= (
        ~np.uint8(abi.STREAMED) if s["Unit"]["flags"].dtype == np.uint8 else ~np.uint32(abi.STREAMED)
    )


@damage(lambda s: [0])
def no_ring(s, n):
    s["Kernel"]["ring"] = 0


@damage(lambda s: [g[0] for g in shared(s)[1:]])
def the_prologue_of_another_operand(s, n):
    s["Op"]["prologue"][n] = s["Unit"]["prologue"][n] = s["Op"]["prologue"][shared(s)[0][0]]


@damage(lambda s: np.flatnonzero(s["Op"]["prologue"]))
def a_unit_with_another_prologue(s, n):
    s["Unit"]["prologue"][n] += 1


@damage(lambda s: np.flatnonzero(np.diff(s["Task"]["worker"].astype(int)) > 0))
def a_record_on_another_worker(s, n):
    s["Task"]["worker"][n] = s["Task"]["worker"][n + 1] + 1


@damage(lambda s: np.flatnonzero(s["Task"]["n_waits"]))
def a_task_before_what_it_waits_for(s, n):
    """Its record comes first on the worker of the task that fires its event, and so neither can start."""
    t, x = s["Task"], s["Stream"]
    e = t["wait"][n][0]
    fires = next(m for m in range(len(t)) if e in t["trigger"][m][: t["n_triggers"][m]] and t["op"][m] != t["op"][n])
    t["worker"][n] = t["worker"][fires]
    first = int(np.flatnonzero(t["worker"] == t["worker"][n])[0])
    order = np.delete(np.arange(len(t)), n)
    order = np.insert(order, first - (first > n), n)
    s["Task"], place = t[order], np.argsort(order)
    x["worker"], x["task"] = t["worker"][x["task"]], place[x["task"]]
    s["Stream"] = x[np.argsort(x["task"], kind="stable")]


def drawn(where: object) -> Iterator[int]:
    """The first, the last and four between, drawn."""
    found = np.asarray(list(where), int)
    if len(found):
        rng = np.random.default_rng(len(found))
        yield from sorted({int(found[0]), int(found[-1]), *rng.choice(found, 4).tolist()})


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_rejected(blob, name):
    where, change = DAMAGES[name]
    tried = 0
    for n in drawn(where({k: v.copy() for k, v in abi.decode(blob).sections.items()})):

        def apply(s: Sections, n: int = n) -> bool:
            change(s, n)
            return True

        damaged = rebuilt(blob, apply)
        assert damaged != blob
        tried += 1
        with pytest.raises((VerifyError, abi.ProgramError)):
            verify(damaged, target=H100)
    assert tried, "nothing to damage"


@pytest.mark.parametrize("layout", [{}, {"fused": True}, {"transposed": True, "stacked": True}, {"heads_first": True}])
def test_what_is_not_damaged_passes(layout):
    made = decoder(**layout)
    p = abi.decode(made)
    assert verify(made, target=H100).tasks
    assert (p["Unit"]["parts"] > 1).any() and len(p["Stream"]) and shared(p.sections)
