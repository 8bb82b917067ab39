"""The generated CUDA source, run on the host under several orders of threads, against NumPy and the CPU executor."""

from __future__ import annotations

import functools
import re
import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jax_mpk import device
from jax_mpk.kinds.contract import cuda as contract_cuda
from models import decode, registry
from tests import emulator, functions
from tests.device import launch, programs
from tests.execute import Runner

if shutil.which("g++") is None:
    pytest.skip("the emulator needs g++", allow_module_level=True)

BF16 = ml_dtypes.bfloat16


def gpu(arch: str, workers: int = 4, **knobs: Any) -> device.Device:
    """A GPU that cuts operators as an H100 does, with so many multiprocessors."""
    return replace(device.cuda(arch, **knobs), workers=workers)


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative, over what is finite; the rest is equal, and so are the signs of zeros."""
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    zero = (got == 0) & (want == 0)
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))
    got, want = got[finite], want[finite]
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize("columns_inner", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_contractions(arch, batch, columns_inner):
    x, w = programs.chain_operands(batch, 256, 384, 2)
    runner = Runner(
        programs.chain(columns_inner=columns_inner), x, *programs.layout(w, columns_inner), target=gpu(arch, 3)
    )
    site = emulator.Site(runner.blob)
    assert bool(site.kernel["ring"]) == (arch == "sm_90a")
    outs = [site.run(runner, seed=seed)[0] for seed in range(3)]  # epochs go on from launch to launch
    assert error(outs[0], programs.chain_reference(x, w)) < 3e-3
    assert all((out == outs[0]).all() for out in outs)


@pytest.mark.parametrize("columns_inner", [True, False])
@pytest.mark.parametrize("room,chunks", [(8, {256, 128}), (6, {256, 128}), (20, {256, 384}), (1, {256, 384})])
def test_an_activation_that_does_not_fit(room, chunks, columns_inner, monkeypatch):
    """It comes in chunks of K, or, where its prologue is a norm or nothing fits, from the workspace: the same bits."""
    x, w = programs.chain_operands(16, 256, 384, 1)
    outs = []
    for kilobytes in (room, 64):
        monkeypatch.setattr(contract_cuda, "ROOM", kilobytes << 10)
        runner = Runner(programs.chain(columns_inner=columns_inner), x, *programs.layout(w, columns_inner),
                        target=device.cuda("sm_90a", 1, ring=4))  # fmt: skip
        site = emulator.Site(runner.blob)
        found = set(map(int, re.findall(r"int KC = (\d+)", site.text)))
        assert found == (chunks if kilobytes == room else {256, 384}), found
        assert (site.kernel["spill"] > 0) == (kilobytes < 9), "rows of 256 take 8.25 KB"
        outs.append(site.run(runner, seed=kilobytes)[0])
    assert error(outs[0], programs.chain_reference(x, w)) < 3e-3
    np.testing.assert_array_equal(*outs)


SHAPES = [(1, 2, 4, 64, 256), (1, 1, 2, 128, 640), (3, 2, 5, 128, 96), (1, 1, 3, 24, 50), (9, 8, 2, 64, 200), (1, 1, 1, 32, 1100),
          (2, 1, 3, 64, 160), (1, 1, 4, 256, 96), (20, 8, 3, 32, 70), (2, 2, 8, 64, 900), (1, 1, 12, 128, 300), (1, 2, 1, 96, 130),
          (2, 1, 12, 96, 600), (1, 1, 2, 160, 40), (1, 1, 8, 256, 290), (40, 4, 5, 64, 300)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, np.float32], ids=["bf16", "f32"])
def test_attention(shape, dtype):
    args = programs.attend_operands(*shape, dtype)
    runner = Runner(programs.attend, *args, target=gpu("sm_90a", 5))
    site, S = emulator.Site(runner.blob), shape[-1]
    for seed, first in enumerate((0, S // 2, S - 1)):
        runner.args[3] = np.minimum(first + np.arange(shape[0]), S - 1).astype(np.int32)
        got, k2, v2 = site.run(runner, seed=seed)
        want, want_k, want_v = programs.attend_reference(*runner.args)
        assert (k2 == want_k).all() and (v2 == want_v).all()
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("shape", [(1, 9000), (33, 40)])
def test_rows(shape):
    x = programs.rows_operand(*shape)
    runner = Runner(programs.rows, x, target=gpu("sm_90a"))
    got, want = emulator.Site(runner.blob).run(runner), programs.rows_reference(x)
    assert (got[0] == want[0]).all() and (got[2] == want[2]).all()
    assert np.abs(got[1] - want[1]).max() < 1e-6


@pytest.mark.parametrize("n,count", [(100, 100), (1500, 5)])
@pytest.mark.parametrize("descending,positions", [(False, True), (True, False)])
def test_sort(n, count, descending, positions):
    x = programs.sort_operand(n)
    runner = Runner(programs.sort(count, descending, positions), x, target=gpu("sm_90a", 2))
    (got,) = emulator.Site(runner.blob).run(runner)
    assert (got == programs.sort_reference(x, count, descending, positions)).all()


def test_a_stuck_launch_ends_says_why_and_the_next_one_starts_clean():
    x, w = programs.chain_operands(1, 256, 384, 1)
    runner = Runner(programs.chain(), x, *w, target=gpu("sm_90a", 3))
    site = emulator.Site(launch.without_event(runner.blob, 0), limit_steps=50_000)
    p = site.program
    waiting = next(t for t in p["Task"] if 0 in t["wait"][: t["n_waits"]])
    for _ in range(2):
        out = np.zeros_like(x)
        status = site([x, *w], [out])
        assert np.isnan(out).all(), "what a launch that gave up leaves is never taken for a result"
        assert (status.code, status.name, status.event) == (1, p.name(int(p["Unit"][waiting["op"]]["name"])), 0)
        assert (status.have, status.want) == (0, p["Event"]["threshold"][0])
        assert int(site.state["abort"][0]) == 0 and int(site.state["epoch"][0]) == 1
        assert not site.tables["counters"].any()


def test_results_of_every_type_are_poisoned():
    """After the last store of any block; also a cache that is updated in place."""
    kinds = ("float32", "bfloat16", "float16", "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool")
    x = jnp.arange(300, dtype=jnp.float32)

    def f(x, held):
        x = jnp.sort(x)
        return [(x * 2 + n).astype(t) for n, t in enumerate(kinds)] + [
            jax.lax.dynamic_update_slice(held, jnp.sin(x), (2,))
        ]

    runner = Runner(f, x, jnp.ones(400), target=gpu("sm_90a", 3))
    held = [runner.alias.get(n, -1) for n in range(len(runner.shapes))]
    assert max(held) >= 0, "an operand holds a result"
    site = emulator.Site(launch.without_event(runner.blob, 0), limit_steps=50_000)
    args = [a.copy() for a in runner.args]
    outs = [args[old] if old >= 0 else np.ones(s.shape, s.dtype) for old, s in zip(held, runner.shapes, strict=True)]
    assert site(args, outs).code == 1
    for out in outs:
        kind = out.dtype.kind
        bits = out.view(f"u{out.dtype.itemsize}")
        assert (np.isnan(out.astype(np.float32)) if kind in "fV" else out == np.iinfo(out.dtype).min if kind == "i"
                else bits == np.iinfo(bits.dtype).max).all(), out.dtype  # fmt: skip


@functools.cache
def model(name: str, batch: int, dtype: type, slots: int, arch: str = "sm_90a"):
    """A step of a zoo model as the program for a GPU, its operands, and what the CPU executor gives."""
    made, _ = registry.load(name, dtype=dtype, seed=3)
    graphdef, state = nnx.split(made)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, dtype), made.init_cache(batch, slots))
    args = state, jnp.arange(batch, dtype=jnp.int32) + 5, cache, jnp.int32(slots // 2)
    step = functools.partial(decode.greedy_step, graphdef)
    return Runner(step, *args, target=gpu(arch)), Runner(step, *args)(threads=2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name,batch", [("qwen3-tiny", 1), ("llama-tiny", 3)])
def test_models(name, batch, dtype, arch):
    """A whole decode step: every result close to the CPU executor's, and the same bits whatever the threads do."""
    site = same_as_the_executor(*model(name, batch, dtype, 72, arch), 2e-2 if dtype == jnp.bfloat16 else 2e-5)
    assert bool(site.kernel["ring"]) == (arch == "sm_90a" and dtype == jnp.bfloat16)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", functions.NO_DECODERS)
def test_functions_that_are_no_decoder(name, dtype, arch):
    f, args = functions.no_decoder(name, 3, dtype)
    want = Runner(f, *args)(threads=2)
    same_as_the_executor(Runner(f, *args, target=gpu(arch)), want, 1e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", [*functions.CASES, *functions.TASKS])
def test_everything_that_is_lowered(name, arch):
    f, args = (functions.CASES | functions.TASKS)[name]
    want = Runner(f, *args)(threads=2)
    narrow = any(x.dtype.itemsize == 2 for x in want)
    same_as_the_executor(Runner(f, *args, target=gpu(arch)), want, 1e-2 if narrow else 1e-5)


def same_as_the_executor(runner: Runner, want: list[np.ndarray], tolerance: float) -> emulator.Site:
    """Two orders of threads give the same bits, close to `want`."""
    site = emulator.Site(runner.blob)
    runs = site.run(runner, seed=0), site.run(runner, seed=1)
    for got, again, x in zip(*runs, want, strict=True):
        np.testing.assert_array_equal(got.reshape(-1).view(np.uint8), again.reshape(-1).view(np.uint8))
        if got.dtype.kind in "iub":
            np.testing.assert_array_equal(got, x)
        else:
            assert error(got.astype(np.float32), x.astype(np.float32)) < tolerance
    return site
