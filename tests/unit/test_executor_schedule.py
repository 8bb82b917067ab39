"""Who runs the tasks: workers that are late, absent or not let run hold up nothing, and only those that are needed wake."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jax_mpk import _ext
from tests.unit.executor_builder import Access, Builder, Code, Stage, V, elementwise, instr
from tests.unit.test_executor_damaged import script, small


def endless(b: Builder, x: int, out: int) -> int:
    n = 1 << 30
    code = Code(
        [Stage("VECTOR", [instr("LOAD", V), instr("STORE", a=V, aux=1)])],
        [Access(0), Access(1)],
        {0: (0, n), 1: (0, n)},
        1,
    )
    return b.op("ROWS", "endless", (n, n), (n, n), [x, out], {"MAIN": [code]})


@pytest.mark.parametrize("threads", [2, 3])
def test_what_waits_behind_a_long_task_is_taken_over(threads: int) -> None:
    """Worker 1 is in an endless task; the ones behind it in its list, and all that wait for them, run all the same."""
    b = Builder(workers=threads)
    x, out = b.arg(400), b.result(400)
    buffers = [x, *(b.temp(400) for _ in range(5)), out]
    b.task(endless(b, x, b.temp(4)), 0, 1)
    for i in range(6):
        op = elementwise(b, f"add{i}", buffers[i], buffers[i + 1], 100, 100, [instr("F_ADD", V + 1, V, V)], V + 1)
        e = b.event(1)
        b.task(op, 0, 1 if i % 2 == 0 else 0, (e - 1,) if i else (), (e,))
    data, result = np.ones(100, np.float32), np.zeros(100, np.float32)
    with pytest.raises(TimeoutError, match=r"task 0 \(endless\[0\]\) has not ended; 6 of 7 tasks are done"):
        _ext.run(b.blob(), [data], [result], threads=threads, deadline_ms=500)
    assert (result == 64).all()


def test_threads_that_cannot_be_had(tmp_path: Path) -> None:
    """Where no thread can be started, the caller runs everything."""
    body = """
resource.setrlimit(resource.RLIMIT_AS, (virtual() + (3 << 20), resource.RLIM_INFINITY))  # no room for a stack
print(run(blobs[0], threads=8))
limit(0)
print(run(blobs[0], threads=8), len(__import__("os").listdir("/proc/self/task")) >= 3)
"""
    out = script(tmp_path, body, [small()], [4], [4]).splitlines()
    assert out == ["[2.0]", "[2.0] True"]


def switches() -> dict[str, int]:
    """Context switches of every thread of this process."""
    out = {}
    for task in Path("/proc/self/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        out[task.name] = sum(int(x.split()[1]) for x in lines if "ctxt_switches" in x)
    return out


def test_workers_that_are_not_offered_anything_sleep() -> None:
    """After a launch with 16 threads, launches with two: 14 workers do not even wake up."""
    b = Builder(workers=16)
    x, y = b.arg(4 << 16), b.result(4 << 16)
    b.tasks(elementwise(b, "sin", x, y, 1 << 16, 1 << 10, [instr("F_SIN", V + 1, V)], V + 1))
    blob, data, out = b.blob(), np.ones(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    for _ in range(20):
        _ext.run(blob, [data], [out], threads=16)
    deadline = time.monotonic() + 30
    while True:  # until everybody sleeps
        before = switches()
        time.sleep(0.3)
        if sum(switches()[t] != n for t, n in before.items()) <= 1 or time.monotonic() > deadline:
            break
    before = switches()
    for _ in range(100):
        _ext.run(blob, [data], [out], threads=2)
        time.sleep(0.001)
    after = switches()
    awake = [t for t, n in before.items() if after.get(t, n) != n]
    assert len(before) >= 16 and len(awake) <= 6, awake  # this thread, one worker, and whatever else the process has


def test_callers_that_meet_run_alone() -> None:
    """The pool is one launch's; the others do not wait for it, whatever it does."""
    b = Builder(workers=2)
    x, out = b.arg(4), b.result(4)
    for worker in range(2):
        b.task(endless(b, x, out), 0, worker)
    stuck: list[str] = []

    def hold() -> None:
        with pytest.raises(TimeoutError) as e:
            _ext.run(b.blob(), [np.ones(1, np.float32)], [np.zeros(1, np.float32)], threads=2, deadline_ms=2000)
        stuck.append(str(e.value))

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.1)
    done = 0
    while holder.is_alive():
        result = np.zeros(1, np.float32)
        _ext.run(small(), [np.ones(1, np.float32)], [result], threads=2)
        assert result[0] == 2
        done += 1
    holder.join()
    assert done > 10 and "has not ended" in stuck[0]
