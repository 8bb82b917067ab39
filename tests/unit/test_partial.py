"""Long rows in two steps: the index of `jnp.argmax` and `jnp.argmin`, ties, NaN and infinities included."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_mpk.device import CPU, Device
from jax_mpk.frontend import lower
from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Map
from jax_mpk.options import Options
from jax_mpk.passes import fuse, partial, recognise, simplify
from models import decode, registry
from tests import execute

WIDE = Device("cpu", workers=132, columns=64, tasks=132)
"""The executor with as many workers as a GPU."""
SMALL = replace(WIDE, columns=8, tasks=40)


@pytest.fixture
def short(monkeypatch):
    """Slices of a few elements."""
    monkeypatch.setattr(partial, "SLICE", 8)


def _rows(kind: str, rows: int, n: int, dtype: type) -> np.ndarray:
    """Rows that differ in where the extreme is: in every slice, at both ends, more than once, or nowhere."""
    r = np.random.default_rng([rows, n, len(kind)])
    x = r.integers(-3, 4, (rows, n)).astype(dtype) if kind == "ties" else (50 * r.normal(size=(rows, n))).astype(dtype)
    for i in range(rows):
        a, b = sorted(r.choice(n, 2, replace=False))
        if kind == "ends":
            x[i, [0, -1]] = (99, 99)
        elif kind == "equal":
            x[i] = 2
        elif kind == "nan":
            x[i, [a, b]] = np.nan
            x[i, (a + b) // 2] = np.inf
        elif kind == "inf":
            x[i, [a, b]] = np.inf
            x[i, (a + b) // 2] = -np.inf
        elif kind == "all -inf":
            x[i] = -np.inf
        elif kind == "zeros":
            x[i] = -np.abs(x[i])
            x[i, [a, b]] = 0.0, -0.0
        elif kind == "all nan":
            x[i] = np.nan
    return x


FLOATS = ("random", "ties", "ends", "equal", "nan", "inf", "all -inf", "zeros", "all nan")


@pytest.mark.parametrize("n", [80, 97, 320, 321, 391, 639, 1000])
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_index_of_the_first_extreme(short, kind, n, rows):
    x = _rows(kind, rows, n, np.float32)
    f = lambda x: (jnp.argmax(x, -1), jnp.argmin(x, -1))  # noqa: E731
    g = partial.run(fuse.run(lower(jax.make_jaxpr(f)(x)), SMALL), SMALL)
    assert sum(isinstance(op, Map) for op in g.ops) == 4, "not in two steps"
    for got, want in zip(interpret.run(g, [x.copy()]), f(x), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "int8"])
@pytest.mark.parametrize("shape", [(1, 391), (3, 1000), (2, 2, 321)])
@pytest.mark.parametrize("kind", ["ties", "ends"])
def test_on_the_executor(short, kind, shape, dtype):
    x = np.abs(_rows(kind, int(np.prod(shape[:-1])), shape[-1], np.float32)).reshape(shape)
    x = jnp.asarray(x, dtype)
    f = lambda x: (jnp.argmax(x, -1), jnp.argmin(x * 2, -1))  # noqa: E731
    run = execute.Runner(f, x, target=SMALL)
    assert len(run.compiled.stages["partial"].ops) == 4
    for seed in (-1, 1, 2):
        for got, want in zip(run(seed=seed), jax.jit(f)(x), strict=True):
            np.testing.assert_array_equal(got, want)


def test_nan_on_the_executor(short):
    for kind in FLOATS:
        x = _rows(kind, 3, 391, np.float32)
        (got,) = execute.Runner(lambda x: jnp.argmax(x, -1), x, target=SMALL)()
        np.testing.assert_array_equal(got, np.argmax(x, -1), kind)


def test_a_vocabulary_of_many_workers():
    x = np.zeros((2, 151_936), np.float32)
    x[0, [7, 80_001, 151_935]] = x[1, 151_935] = 1
    run = execute.Runner(lambda x: jnp.argmax(x, -1), x, target=WIDE)
    first, last = (g for g in run.compiled.stages["partial"].ops)
    assert first.domain[0] == 2 and 40 <= first.domain[1] <= 66 and last.domain == (2,)
    assert run.compiled.stages["memory"].grids[0].count >= 64
    np.testing.assert_array_equal(run()[0], [7, 151_935])


def test_only_where_it_pays(short):
    x = np.zeros((1, 4096), np.float32)
    cases = {
        "a target of few workers": (lambda x: jnp.argmax(x, -1), x, CPU),
        "many rows": (lambda x: jnp.argmax(x, -1), np.zeros((64, 4096), np.float32), SMALL),
        "a short row": (lambda x: jnp.argmax(x, -1), x[:, :63], SMALL),
        "a reduction inside": (lambda x: jnp.argmax(jax.nn.softmax(x, -1), -1), x, SMALL),
    }
    for name, (f, x, target) in cases.items():
        g = fuse.run(recognise.run(simplify.run(lower(jax.make_jaxpr(f)(x)))), target)
        assert len(partial.run(g, target).ops) == len(g.ops), name


def test_a_decode_step(monkeypatch):
    monkeypatch.setattr(partial, "SLICE", 16)
    model, config = registry.load("llama-tiny", dtype=jnp.float32, seed=0)
    graphdef, state = nnx.split(model)
    step = lambda s, t, c, p: decode.greedy_step(graphdef, s, t, c, p)  # noqa: E731
    args = state, jnp.arange(3, dtype=jnp.int32), model.init_cache(3, 32), jnp.int32(3)
    run = execute.Runner(step, *args, target=WIDE, options=Options(cache_entries=0))
    assert len(run.compiled.stages["partial"].ops) == len(run.compiled.stages["fuse"].ops) + 1, config
    token, logits = run(seed=4)[:2]
    np.testing.assert_array_equal(token, np.argmax(logits, -1))
    want = jax.jit(step)(*args)
    np.testing.assert_array_equal(token, want[0])
    np.testing.assert_allclose(logits, want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape, k", [((1, 391), 3), ((3, 1000), 10), ((2, 2, 321), 1), ((2, 512), 6)])
@pytest.mark.parametrize("kind", FLOATS)
def test_the_largest_of_a_row(short, kind, shape, k, dtype):
    """Values and positions, ties and NaN included; rows that slices divide and rows with a rest."""
    x = _rows(kind, int(np.prod(shape[:-1])), shape[-1], np.float32).reshape(shape)
    x = jnp.asarray(np.clip(np.nan_to_num(x), -99, 99) if dtype == "int32" else x, dtype)
    f = lambda x: jax.lax.top_k(x, k)  # noqa: E731
    run = execute.Runner(f, x, target=SMALL)
    assert sum(op.kind == "sort" for op in run.compiled.stages["partial"].ops) == 2, "not in two steps"
    for seed in (-1, 1):
        for got, want in zip(run(seed=seed), f(x), strict=True):
            np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("shape, k", [((4, 50), 6), ((2, 400), 390), ((600, 81), 1)])
def test_short_rows_many_elements_and_many_rows_are_sorted_at_once(short, shape, k):
    x = _rows("ties", *shape, np.float32)
    f = lambda x: jax.lax.top_k(x, k)  # noqa: E731
    run = execute.Runner(f, x, target=SMALL)
    assert sum(op.kind == "sort" for op in run.compiled.stages["partial"].ops) == 1
    for got, want in zip(run(), f(x), strict=True):
        np.testing.assert_array_equal(got, want)
