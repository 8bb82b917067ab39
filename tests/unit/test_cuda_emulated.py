"""The generated CUDA source, run on the host under several orders of threads, against NumPy and the CPU executor."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator
import functions
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from execute import Runner
from flax import nnx

from jax_mpk import device
from models import decode, registry

spec = importlib.util.spec_from_file_location("programs", Path(__file__).parents[1] / "device" / "programs.py")
assert spec and spec.loader
programs = sys.modules.setdefault("programs", importlib.util.module_from_spec(spec))
spec.loader.exec_module(programs)

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
    d, ff, layers = 256, 384, 2
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, d), np.float32)
    w = [(rng.standard_normal(s, np.float32) / s[0] ** 0.5).astype(BF16) for s in [(d, ff), (d, ff), (ff, d)] * layers]
    held = [x, *(a if columns_inner else a.T.copy() for a in w)]
    site = emulator.Site(
        programs.decoder_step(batch, d, ff, layers, columns_inner=columns_inner), Device(arch=arch, workers=3)
    )
    assert (site.source.ring > 0) == (arch == "sm_90a")
    first = None
    for seed in range(3):  # epochs go on from launch to launch
        out = np.full((batch, d), np.nan, np.float32)
        assert site(held, [out], seed=seed).code == 0
        assert error(out, programs.decoder_reference(x, w)) < 3e-3
        first = out if first is None else first
        np.testing.assert_array_equal(out, first)


@pytest.mark.parametrize("columns_inner", [True, False])
@pytest.mark.parametrize("room,chunks", [(8, {256, 128}), (6, {256, 128}), (20, {256, 384}), (1, {256, 384})])
def test_an_activation_that_does_not_fit(room, chunks, columns_inner, monkeypatch):
    """It comes in chunks of K, or, where its prologue is a norm or nothing fits, from the workspace: the same bits."""
    d, ff, batch = 256, 384, 16
    rng = np.random.default_rng(room)
    x = rng.standard_normal((batch, d), np.float32)
    w = [(rng.standard_normal(s, np.float32) / s[0] ** 0.5).astype(BF16) for s in [(d, ff), (d, ff), (ff, d)]]
    held = [x, *(a if columns_inner else a.T.copy() for a in w)]
    blob = programs.decoder_step(batch, d, ff, 1, columns_inner=columns_inner)
    outs = []
    for kilobytes in (room, 64):
        monkeypatch.setattr(cuda_variant, "ROOM", kilobytes << 10)
        site = emulator.Site(blob, Device(workers=3, ring=4))
        found = set(map(int, re.findall(r"int KC = (\d+)", site.source.text)))
        assert found == (chunks if kilobytes == room else {256, 384}), found
        assert (site.source.spill > 0) == (kilobytes < 9), "rows of 256 take 8.25 KB"
        out = np.full((batch, d), np.nan, np.float32)
        assert site(held, [out], seed=kilobytes).code == 0
        outs.append(out)
    assert error(outs[0], programs.decoder_reference(x, w)) < 3e-3
    np.testing.assert_array_equal(*outs)


SHAPES = [(1, 2, 4, 64, 256), (1, 1, 2, 128, 640), (3, 2, 5, 128, 96), (1, 1, 3, 24, 50), (9, 8, 2, 64, 200), (1, 1, 1, 32, 1100),
          (2, 1, 3, 64, 160), (1, 1, 4, 256, 96), (20, 8, 3, 32, 70), (2, 2, 8, 64, 900), (1, 1, 12, 128, 300), (1, 2, 1, 96, 130),
          (2, 1, 12, 96, 600), (1, 1, 2, 160, 40), (1, 1, 8, 256, 290), (40, 4, 5, 64, 300)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_attention(shape, dtype):
    B, H, G, D, S = shape
    rng = np.random.default_rng(S)
    kind = BF16 if dtype == "BF16" else np.float32
    q, k, v = (rng.standard_normal(s, np.float32) for s in ((B, H, G, D), (B, H, D), (B, H, D)))
    kc, vc = (rng.standard_normal((B, S, H, D), np.float32).astype(kind) for _ in range(2))
    site = emulator.Site(programs.attention_step(B, H, G, D, S, dtype), Device(workers=5))
    for seed, first in enumerate((0, S // 2, S - 1)):
        pos = np.minimum(first + np.arange(B), S - 1).astype(np.int32)
        k2, v2, got = kc.copy(), vc.copy(), np.full((B, H, G, D), np.nan, np.float32)
        assert site([q, k, v, pos, k2, v2], [got, k2, v2], seed=seed).code == 0
        want_k, want_v = kc.copy(), vc.copy()
        want_k[np.arange(B), pos], want_v[np.arange(B), pos] = k.astype(kind), v.astype(kind)
        assert (k2 == want_k).all() and (v2 == want_v).all()
        s = np.einsum("bhgd,bshd->bhgs", q.astype(np.float64) * D**-0.5, want_k.astype(np.float64))
        s = np.where(np.arange(S) <= pos[:, None, None, None], s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        assert error(got, np.einsum("bhgs,bshd->bhgd", p / p.sum(-1, keepdims=True), want_v.astype(np.float64))) < 1e-5


@pytest.mark.parametrize("shape", [(1, 9000), (33, 40)])
def test_rows(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    x[0, [7, 20]] = 9.0  # a tie: the first wins
    top, soft, edge = (
        np.zeros(shape[:1], np.int32),
        np.full(shape, np.nan, np.float32),
        np.full(shape, np.nan, np.float32),
    )
    assert emulator.Site(programs.rows_program(*shape), Device(workers=4))([x], [top, soft, edge]).code == 0
    assert (top == x.argmax(-1)).all()
    p = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    assert np.abs(soft - p / p.sum(-1, keepdims=True)).max() < 1e-6
    want = x.copy()
    want[:, 3:10] += 1
    assert (edge == want).all()


@pytest.mark.parametrize("n,count", [(100, 100), (1500, 5)])
@pytest.mark.parametrize("descending,positions", [(False, True), (True, False)])
def test_sort(n, count, descending, positions):
    x = np.round(np.random.default_rng(n).standard_normal((3, n), np.float32) * 50) / 8  # many equal keys
    out = np.zeros((3, count), np.int32 if positions else np.float32)
    emulator.Site(programs.sort_program(3, n, count, descending, positions), Device(workers=2))([x], [out])
    at = np.argsort(-x if descending else x, axis=-1, kind="stable")[:, :count]
    assert (out == (at if positions else np.take_along_axis(x, at, -1))).all()


def test_a_stuck_launch_ends_says_why_and_the_next_one_starts_clean():
    d, ff = 256, 384
    x = np.ones((1, d), np.float32)
    w = [np.zeros(s, BF16) for s in [(d, ff), (d, ff), (ff, d)]]
    site = emulator.Site(programs.decoder_step(1, d, ff, 1, lose_event=True), Device(workers=3), limit_steps=50_000)
    for _ in range(2):
        status = site([x, *w], [np.zeros((1, d), np.float32)])
        assert (status.code, status.name, status.event) == (1, "down0", 0)
        assert (status.have, status.want) == (ff // 64, ff // 64 + 1)
        assert int(site.state["abort"][0]) == 0 and int(site.state["epoch"][0]) == 1
        assert not site.tables["counters"].any()


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
