"""Ten thousand random sound task graphs are accepted, and as many damaged ones are rejected by name."""

import re

import numpy as np
import pytest

from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, WRITE, TaskGraph
from jax_mpk.verify import verify
from tests.taskgraphs import Builder, damages, decoder, oracle, sound

CHUNKS, SEEDS = 20, 500

ALONE = re.compile(
    r"event \d+: 0 tasks trigger it"  # nobody is left to be named
    r"|event \d+: 1 tasks trigger it and its threshold is \d+: task \d+ \([^)]*\) triggers it$"
    r"|are written by no task"
    r"|a buffer that no task writes$"
    r"|at the same place$"
    r"|(task \d+) .*\1 "  # a task in the way of itself
)
"""Mistakes that only one task has a part in. All others name two."""


def rejection(tg: TaskGraph) -> str | None:
    try:
        verify(tg)
    except VerifyError as e:
        return str(e)
    return None


def named(message: str) -> int:
    return len(set(re.findall(r"task (\d+) \(\w+\[\d+\] on worker \d+\)", message)))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random(chunk: int) -> None:
    harmless = alone = 0
    for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS):
        again = f"seed {seed}: python -m tests.taskgraphs {seed}"
        tg = sound(seed)
        assert oracle(tg) is None, again
        assert rejection(tg) is None, again
        for damage in damages(tg, np.random.default_rng(seed)):
            why = oracle(damage.tg)
            message = rejection(damage.tg)
            assert (why is None) == (message is None), f"{again} {damage.name}: oracle {why}, verifier {message}"
            assert not (damage.fatal and why is None), f"{again} {damage.name} is not fatal"
            if message is not None:
                assert named(message) >= 2 or ALONE.search(message), f"{again} {damage.name}: {message}"
                alone += named(message) < 2
                break  # one damage that is confirmed as unsound a graph
            harmless += 1
        else:
            pytest.fail(f"{again}: no damage is unsound")
    assert harmless > 0  # accepting what is still sound is tested, too
    assert alone < 0.1 * SEEDS


def test_every_damage_happens() -> None:
    """Each kind, on graphs of other seeds: both verdicts agree, and none is always harmless."""
    unsound: dict[str, int] = {}
    for seed in range(10**6, 10**6 + 60):
        tg = sound(seed)
        for damage in damages(tg, np.random.default_rng(seed)):
            why = oracle(damage.tg)
            assert (why is None) == (rejection(damage.tg) is None), f"{seed} {damage.name}: oracle {why}"
            unsound[damage.name] = unsound.get(damage.name, 0) + (why is not None)
    assert len(unsound) == 20 and all(unsound.values()), unsound


def test_a_model() -> None:
    tg = decoder(layers=3, batch=4, context=64)
    certificate = verify(tg)
    assert certificate.tasks == tg.tasks and certificate.events == tg.events
    assert str(certificate).startswith("verified: ")
    rejected = set()
    for seed in range(3):
        for damage in damages(tg, np.random.default_rng(seed)):
            message = rejection(damage.tg)
            assert message or not damage.fatal, f"seed {seed} {damage.name}"
            if message:
                rejected.add(damage.name)
                assert named(message) >= 2 or ALONE.search(message), message
    assert {"wait_dropped", "write_lost", "buffers_overlapped", "producer_forgotten"} <= rejected


def test_a_large_model() -> None:
    """31,000 tasks; `python -m tests.taskgraphs` prints how long it takes."""
    tg = decoder()
    assert verify(tg).tasks == tg.tasks > 30_000


def test_many_tasks_one_after_the_other() -> None:
    """As many events as tasks, and a chain as long as the program: the worst case for reachability."""
    b = Builder()
    tasks = b.grid("step", 20_000)
    ping = [b.buffer("workspace", 64) for _ in tasks]
    out = b.buffer("result", 64)
    for t in tasks:
        if t:
            b.box(t, READ, ping[t - 1], 0, 64)
            b.event([t - 1], [t])
        b.box(t, WRITE, ping[t] if t < tasks[-1] else out, 0, 64)
    assert verify(b.build()).events == len(tasks) - 1
