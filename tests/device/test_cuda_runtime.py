"""What only a device shows: tables of fresh sites, damaged programs through XLA, two streams, the read-only stream."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk.backends.cuda import backend as cuda
from jax_mpk.errors import ExecutionError
from tests.device import launch, programs

pytestmark = pytest.mark.device


def test_the_first_launch_of_a_fresh_site_sees_its_tables():
    """A site's tables go to the device from pageable memory; a launch that starts before they arrive does nothing or
    reads the wrong operands. Another thread keeps the copy engine busy."""
    x = programs.rows_operand(1, 128256)
    want = programs.rows_reference(x)
    blob = launch.program(programs.rows, x)
    shapes = jax.eval_shape(programs.rows, x)
    done, ballast = threading.Event(), np.zeros(64 << 20, np.uint8)

    def busy() -> None:
        while not done.is_set():
            jax.device_put(ballast).block_until_ready()

    other = threading.Thread(target=busy)
    other.start()
    try:
        for deadline in range(5000, 5020):  # another attribute: another executable, and a site of its own
            top, soft, edge = (np.asarray(a) for a in jax.jit(launch.function(blob, shapes, deadline))(x))
            assert top[0] == want[0][0] and (edge == want[2]).all()
            assert np.abs(soft - want[1]).max() < 1e-6
    finally:
        done.set()
        other.join()


def test_a_program_without_one_of_its_events_ends_in_an_error_that_names_everything():
    x, w = programs.chain_operands(1, 512, 1024, 1)
    held = [jnp.asarray(x), *map(jnp.asarray, w)]
    good = launch.program(programs.chain(), *held)
    shapes = jax.eval_shape(programs.chain(), *held)
    run = lambda blob: jax.jit(launch.function(blob, shapes, 50))  # noqa: E731
    want = np.asarray(run(good)(*held)[0])
    stuck = run(launch.without_event(good, 0))
    jax.block_until_ready(stuck(*held))
    with pytest.raises(
        Exception,
        match=r"gave up after 50 ms: task \d+ \(.+\[\d+\] on worker \d+\) waits for event 0, which has 0 of \d+",
    ):
        jax.block_until_ready(stuck(*held))
    jax.block_until_ready(stuck(*held))  # gives up again: the counters were cleared, and nothing hangs
    with pytest.raises(ExecutionError, match="event 0"):
        cuda.check()
    np.testing.assert_array_equal(np.asarray(run(good)(*held)[0]), want)


def test_two_programs_on_two_streams():
    """Two executables dispatched from two threads, many times: each keeps its counters, and its bits."""
    _, w = programs.chain_operands(1, 512, 1024, 1)
    held = list(map(jnp.asarray, w))
    rng = np.random.default_rng(1)
    x = [jnp.asarray(rng.standard_normal((b, 512), np.float32)) for b in (1, 8)]
    runs = [jax.jit(jax_mpk.megakernelize(programs.chain(), implementation="cuda")) for _ in x]
    want = [np.asarray(f(a, *held)) for f, a in zip(runs, x, strict=True)]
    wrong: list[int] = []

    def turns(n: int) -> None:
        got = [runs[n](x[n], *held) for _ in range(200)]
        wrong.extend(n for g in got if not (np.asarray(g) == want[n]).all())

    threads = [threading.Thread(target=turns, args=(n,)) for n in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    cuda.check()


def test_the_read_only_stream():
    assert cuda.read_bandwidth(256 << 20) > 0
    with pytest.raises(RuntimeError, match="no room for"):
        cuda.read_bandwidth(1 << 45)
