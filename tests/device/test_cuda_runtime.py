"""What only a device shows: tables of fresh sites, damaged programs through XLA, two streams, the read-only stream."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import launch
import numpy as np
import programs
import pytest

from jax_mpk import abi
from jax_mpk.backends.cuda import backend as cuda

pytestmark = pytest.mark.device


def test_the_first_launch_of_a_fresh_site_sees_its_tables():
    """A site's tables go to the device from pageable memory; a launch that starts before they arrive does nothing or
    reads the wrong operands. Tables of a megabyte, while another thread keeps the copy engine busy."""
    x = np.random.default_rng(0).standard_normal((1, 128256), np.float32)
    results = [((1,), jnp.int32), (x.shape, jnp.float32), (x.shape, jnp.float32)]
    blob = programs.rows_program(*x.shape)
    p = np.exp(x.astype(np.float64) - x.max())
    done, ballast = threading.Event(), np.zeros(64 << 20, np.uint8)

    def busy() -> None:
        while not done.is_set():
            jax.device_put(ballast).block_until_ready()

    other = threading.Thread(target=busy)
    other.start()
    try:
        for deadline in range(5000, 5020):  # another attribute: another executable, and a site of its own
            run = jax.jit(launch.function(blob, results, launch.device(), deadline_ms=deadline))
            top, soft, edge = (np.asarray(a) for a in run(x))
            assert top[0] == x.argmax()
            assert np.abs(soft - p / p.sum()).max() < 1e-6
            assert (edge[0, 10:] == x[0, 10:]).all()
    finally:
        done.set()
        other.join()


def damaged(blob: bytes, event: int) -> bytes:
    """The program with every trigger of one event removed, after whoever verified it."""
    p = abi.decode(blob)
    sections = {name: p[name].copy() for name in abi.SECTIONS}
    for t in sections["Task"]:
        kept = [int(e) for e in t["trigger"][: int(t["n_triggers"])] if int(e) != event]
        t["n_triggers"], t["trigger"] = len(kept), 0
        t["trigger"][: len(kept)] = kept
    head = {k: int(p.header[k]) for k in ("workspace", "workers", "args", "results", "ranks", "rank", "iterations")}
    return abi.encode(sections, **head)


def test_a_program_without_one_of_its_events_ends_in_an_error_that_names_everything():
    batch, d, ff = 1, 512, 1024
    good = programs.decoder_step(batch, d, ff, 1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, d), np.float32)
    w = [(rng.standard_normal(s, np.float32) / s[0] ** 0.5).astype(jnp.bfloat16) for s in [(d, ff), (d, ff), (ff, d)]]
    held = [jnp.asarray(x), *map(jnp.asarray, w)]
    run = lambda blob: jax.jit(launch.function(blob, [((batch, d), jnp.float32)], launch.device(), deadline_ms=50))  # noqa: E731
    want = np.asarray(run(good)(*held)[0])
    stuck = run(damaged(good, 0))
    jax.block_until_ready(stuck(*held))
    with pytest.raises(
        Exception,
        match=r"gave up after 50 ms: task \d+ \(down0\[\d+\] on worker \d+\) waits for event 0, which has 0 of 16",
    ):
        jax.block_until_ready(stuck(*held))
    jax.block_until_ready(stuck(*held))
    assert "event 0" in launch.extension().cuda_check()
    np.testing.assert_array_equal(np.asarray(run(good)(*held)[0]), want)


def test_two_programs_on_two_streams():
    """Two executables dispatched from two threads, many times: each keeps its counters, and its bits."""
    d, ff = 512, 1024
    rng = np.random.default_rng(1)
    w = [
        jnp.asarray((rng.standard_normal(s, np.float32) / s[0] ** 0.5).astype(jnp.bfloat16))
        for s in [(d, ff), (d, ff), (ff, d)]
    ]
    x = [jnp.asarray(rng.standard_normal((b, d), np.float32)) for b in (1, 8)]
    runs = [
        jax.jit(launch.function(programs.decoder_step(b, d, ff, 1), [((b, d), jnp.float32)], launch.device()))
        for b in (1, 8)
    ]
    want = [np.asarray(f(a, *w)[0]) for f, a in zip(runs, x, strict=True)]
    wrong: list[int] = []

    def turns(n: int) -> None:
        got = [runs[n](x[n], *w)[0] for _ in range(200)]
        wrong.extend(n for g in got if not (np.asarray(g) == want[n]).all())

    threads = [threading.Thread(target=turns, args=(n,)) for n in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and not launch.extension().cuda_check()


def test_the_read_only_stream():
    assert cuda.read_bandwidth(256 << 20) > 0
    with pytest.raises(RuntimeError, match="no room for"):
        cuda.read_bandwidth(1 << 45)
