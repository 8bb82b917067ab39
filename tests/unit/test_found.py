"""Functions that once gave a wrong result, did not compile or took for ever, where `functions.CASES` is too small for them."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mpk
from jax_mpk import compiler, device
from jax_mpk.options import Options
from tests.execute import Runner
from tests.functions import data, ints

UNCACHED = Options(cache_entries=0)


def same(f, *args, **close) -> Runner:
    """Two threads, then a random legal order; poisoned memory."""
    run = Runner(f, *args)
    want = [np.asarray(x) for x in jax.tree.leaves(jax.jit(f)(*args))]
    for have in (run(threads=2), run(seed=5)):
        for x, y in zip(have, want, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            np.testing.assert_allclose(x, y, **({"rtol": 2e-5, "atol": 2e-5} | close))
    return run


def test_a_weight_repeated_many_times():
    """Its copy is as long as the activation: reading on by the stride of the weight left the buffer."""
    same(lambda x, w: x @ jnp.repeat(w, 256, 0), data(1, 4096), data(16, 8), atol=1e-3)


@pytest.mark.parametrize("n", [4097, 20_011])
@pytest.mark.parametrize("reverse", [False, True])
def test_long_cumulative_operations(n, reverse):
    x = data(n)
    run = same(lambda x: lax.cumsum(x, reverse=reverse), x, atol=2e-3)
    assert [g.kind for g in run.compiled.stages["memory"].grids] == ["scan"]
    same(lambda x: lax.cumprod(jnp.clip(x, -1, 1), reverse=reverse), x)
    same(lambda x: lax.cummax(x.astype(jnp.bfloat16), reverse=reverse).astype(jnp.float32), x)


@pytest.mark.parametrize("core", ["contraction", "scan"])
def test_a_result_in_other_dimensions_of_a_core_that_is_also_read_backwards(core):
    """The core stores through the reshape, where the other reader has no digits of its place: a compiler error."""

    def f(x, w):
        y = x @ w if core == "contraction" else jnp.cumsum(x, 1) * 2
        return y.reshape(5, 2, 75), jnp.sin(y[::-1, ::-1]) @ jnp.ones((y.shape[1], 2))

    same(f, data(5, 150), data(150, 150), atol=1e-3)


def test_top_p_over_a_vocabulary():
    def top_p(logits, p):
        order = jnp.argsort(-logits)
        mass = jnp.cumsum(jax.nn.softmax(logits[order]))
        return jnp.where(mass - jax.nn.softmax(logits[order]) < p, logits[order], -jnp.inf)

    same(top_p, data(8192) * 3, np.float32(0.9), atol=1e-4)


# ------------------------------------------------------------------------------------------------------ long expressions


def chain(f, times):
    def g(x):
        for _ in range(times):
            x = f(x)
        return x

    return g


CHAINS = {
    "sin": (jnp.sin, 300), "softmax": (jax.nn.softmax, 50), "select": (lambda x: jnp.where(x > 0, x - 0.5, x + 1.5), 150),
    "move": (lambda x: jnp.concatenate([x[:, 1:], x[:, :1]], 1), 100), "update": (lambda x: x.at[0].set(1.0) * 2, 40),
    "matrix": (lambda x: x @ jnp.eye(7) * 0.9, 40),
}  # fmt: skip


@pytest.mark.parametrize("target", [device.CPU, device.H100], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", CHAINS)
def test_long_chains_compile_from_a_deep_stack(name, target):
    closed = jax.make_jaxpr(chain(*CHAINS[name]))(data(3, 7))
    limit, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back

    def down(n):
        return compiler.compile(closed, target, UNCACHED) if n == 0 else down(n - 1)

    assert down(limit - depth - 60).program
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("name", CHAINS)
def test_long_chains(name):
    same(chain(*CHAINS[name]), data(3, 7))


def test_a_recurrence_that_is_written_out():
    """No step is computed from the start by every later one."""

    def recurrence(a, x):
        return lax.scan(lambda h, z: ((z[0] * h + z[1]),) * 2, jnp.zeros(x.shape[1:]), (a, x))[1]

    run = same(recurrence, data(100, 3) * 0.5, data(100, 3))
    assert len(jax_mpk.abi.decode(run.blob)["Instr"]) < 20_000


def test_dropout_before_a_contraction_as_cuda_source():
    """Equal terms were found by comparing them as trees: exponential in the rounds of the generator."""

    def f(x, w, seed):
        x = jax.nn.softmax(x)
        keep = jax.random.bernoulli(jax.random.key(seed), 0.9, x.shape)
        return jnp.where(keep, x / 0.9, 0) @ w

    closed = jax.make_jaxpr(f)(data(3, 700), data(700, 64), np.uint32(1))
    program = compiler.compile(closed, device.H100, UNCACHED).program
    assert len(jax_mpk.abi.decode(program)["Source"])


def test_dimensions_that_do_not_fit_32_bits():
    def f(x):
        return jnp.broadcast_to(x[:, None], (2, 2**30 + 1))[1, 5]

    with pytest.raises(jax_mpk.UnsupportedError, match="a dimension of more than 1073741824"):
        compiler.compile(jax.make_jaxpr(f)(data(2)), device.CPU, UNCACHED)
    same(lambda x: jnp.broadcast_to(x[:, None, None], (2, 70_000, 40_000))[1, 5, 7], data(2))


# ------------------------------------------------------------------------------------------------------ causal limits

LAST = 2**31 - 1
POSITIONS = [5, 0, -1, -2, 1, 10, 11, 12, 100, LAST, LAST - 1, LAST - 2, -LAST - 1]


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_causal_limits(rows, inclusive):
    """No key at all, more keys than there are, and positions that wrap around: what the mask says, as it is written."""

    def f(q, k, v, pos):
        key, end = jnp.arange(k.shape[1]), pos + jnp.arange(rows)[:, None]
        s = jnp.where(key <= end if inclusive else key < end, jnp.einsum("btd,bsd->bts", q, k), -1e30)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(s, -1), v)

    args = data(2, rows, 4), data(2, 12, 4), data(2, 12, 4, seed=1)
    run = Runner(f, *args, np.int32(0))
    assert "limit:" in run.compiled.text("refine")
    for pos in POSITIONS:
        run.args[3] = np.int32(pos)
        np.testing.assert_allclose(run()[0], jax.jit(f)(*args, np.int32(pos)), rtol=1e-5, atol=1e-5, err_msg=str(pos))


WINDOWS = {
    "and": lambda s, key, end, w: jnp.where((key <= end) & (key > end - w), s, -jnp.inf),
    "exclusive": lambda s, key, end, w: jnp.where(jnp.logical_and(end + 1 > key, end - w < key), s, -1e30),
    "inclusive": lambda s, key, end, w: jnp.where((key >= end - (w - 1)) & (key < end + 1), s, -1e30),
    "or": lambda s, key, end, w: jnp.where((key > end) | (key <= end - w), -1e30, s),
    "not": lambda s, key, end, w: jnp.where(~((key > end) | ~(end - key < w)) & (key > end - w), s, -1e30),
    "twice": lambda s, key, end, w: jnp.where(key > end - w, jnp.where(key <= end, s, -1e30), -1e30),
    "masked twice": lambda s, key, end, w: jnp.where(key <= end - w, -1e30, jnp.where(key > end, -1e30, s)),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("how", WINDOWS)
def test_windowed_limits(how, rows):
    """A sliding window: the keys behind a row's position are not read, whatever else the mask says; rows without any key."""

    def f(q, k, v, pos, window):
        key, end = jnp.arange(k.shape[1]), pos + jnp.arange(rows)[:, None]
        s = WINDOWS[how](jnp.einsum("btd,bsd->bts", q, k), key, end, window)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(s, -1), v)

    args = data(2, rows, 4), data(2, 12, 4), data(2, 12, 4, seed=1)
    run = Runner(f, *args, np.int32(0), np.int32(0))
    assert ("limit:" in run.compiled.text("refine")) == (how != "not"), "a difference of two keys is no bound"
    for pos, window in itertools.product(POSITIONS, (4, 1, 2, 100, 0, -3, LAST, -LAST - 1)):
        run.args[3:] = np.int32(pos), np.int32(window)
        want = jax.jit(f)(*args, *run.args[3:])
        np.testing.assert_allclose(run()[0], want, rtol=1e-5, atol=1e-5, err_msg=f"{pos}, {window}")


def test_keys_behind_a_window_are_not_read():
    def f(q, k, v, pos):
        key = jnp.arange(k.shape[0])
        s = jnp.where((key <= pos) & (key > pos - 3), q @ k.T, -1e30)
        return jax.nn.softmax(s, -1) @ v

    q, k, v = data(2, 4), data(9, 4), data(9, 4, seed=1)
    clean = Runner(f, q, k, v, np.int32(4))()[0]
    k[5:], v[5:] = np.nan, np.inf
    np.testing.assert_array_equal(Runner(f, q, k, v, np.int32(4))()[0], clean)


def test_a_mask_that_real_scores_may_reach_is_no_limit():
    def f(q, k, v, pos):
        s = jnp.where(jnp.arange(k.shape[0]) <= pos, q @ k.T, -1e9)
        return jax.nn.softmax(s, -1) @ v

    run = same(f, data(2, 4) - 3e9, np.abs(data(9, 4)) + 1, data(9, 4, seed=1), np.int32(3))
    assert "limit:" not in run.compiled.text("refine")


def test_masked_keys_are_not_read():
    """A documented difference (docs/decisions.md, 56): what a causal mask excludes has weight zero, NaN or not."""

    def f(q, k, v, pos):
        s = jnp.where(jnp.arange(k.shape[0]) <= pos, q @ k.T, -1e30)
        return jax.nn.softmax(s, -1) @ v

    q, k, v = data(2, 4), data(9, 4), data(9, 4, seed=1)
    clean = Runner(f, q, k, v, np.int32(3))()[0]
    k[4:], v[4:] = np.nan, np.inf
    np.testing.assert_array_equal(Runner(f, q, k, v, np.int32(3))()[0], clean)


def test_operands_without_elements():
    x = data(3, 5)
    same(lambda x: (lax.pad(x[:, :0], np.float32(2), ((0, 0, 0), (1, 2, 0))), x[:, :0].sum(1), x[:0].max(0, initial=-9), x[:, :0] @ x[:0],
                    jnp.concatenate([x[:0], x]), x.at[2:2].set(7.0), jnp.prod(x[:, :0]), jnp.all(x[:0] > 0)), x)  # fmt: skip
    same(lambda i: (i[:0].max(initial=-3), i[:0].sum(), i[:0].astype(jnp.int8).sum()), ints(9, 4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_subtracted_nan_keeps_its_sign(dtype):
    """`top_k` puts a NaN first or last by its sign."""

    def f(x, i, u):
        return lax.top_k(x.at[i].subtract(u), 5)[0].astype(jnp.float32)

    x, u = (np.array(x, dtype) for x in ([1, 2, 3, np.nan, -0.0], [np.nan, -np.inf, 1, 0.0]))
    same(f, x, np.array([0, 1, 3, 4], np.int32), u)


def test_constants_inside_of_nested_reductions():
    """Boxes of a reduction folded them also in a reduction below, which was then another one: no instruction for a piece."""

    def f(x, y):
        rows = jnp.where(jnp.arange(11) % 2 == 0, jnp.concatenate([x, x, x], 0), y)
        return jax.nn.logsumexp(lax.dynamic_index_in_dim(rows, jnp.array(4, jnp.int32), 1))

    same(f, data(2, 11), data(1, 1))


def test_a_slice_of_columns_that_are_repeated():
    """A contraction was taken apart where its operand could not be followed."""

    def f(x, y):
        v = jnp.einsum("ab,xyba->yx", x, jnp.repeat(y[:8], 2, 0))
        return lax.reduce_window(v, jnp.inf, lax.min, (1, 3), (1, 2), "VALID", (1, 1), (1, 2))[:, ::-2]

    same(f, data(4, 32), data(16, 8, 32, 4))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_one_vector_times_a_matrix_and_times_a_vector(arch):
    """Equal left operands, but axes of other numbers: the verifier refused the shared prologue."""

    def f(w, x, y):
        return jnp.mean(jnp.einsum("b,ab->a", x, w) * 4), jnp.einsum("a,a->", x, jnp.broadcast_to(y[:1], (8,)))

    Runner(f, data(40, 8), data(8), data(8), target=device.cuda(arch))


def test_a_long_row_is_reduced_once():
    """The token of a step, stored into the text as well: the update went through the vocabulary again."""

    def f(x, w, text, n):
        token = jnp.argmax(x @ w, -1).astype(jnp.int32)
        return token, lax.dynamic_update_slice(text, token[:, None], (0, n)), n + 1

    run = same(f, data(1, 16), data(16, 40_000), ints(9, 1, 8), np.int32(3))
    ops = run.compiled.stages["fuse"].ops
    assert sum("argmax" in str(e) for op in ops for e in op.exprs().values()) == 1


def test_a_sum_of_columns_chosen_by_a_row_of_extremes():
    """What a map is written into may be inside of a reduction, whose axes are not those of the operator."""

    def f(x, y):
        return jnp.einsum("a,ax->x", jnp.min(x, -1), y) + x[3]

    grad = lambda x, y: jax.grad(lambda *a: f(*a).sum(), (0, 1))(x, y)
    same(grad, data(8, 16), data(8, 16, seed=1))
