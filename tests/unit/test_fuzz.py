"""A few of the fuzzer's functions (`python -m tests.fuzz` draws as many as one likes), and that it sees a wrong result."""

from __future__ import annotations

import faulthandler
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.functions import data
from tests.fuzz import jobs, judge, run, shrink, wide
from tests.fuzz.grow import grow


@pytest.mark.parametrize("seed", range(48))
def test_on_the_executor(seed):
    case = grow(seed)
    v = run.verdict(case)
    assert not v.bad, f"{v.kind}: {v.text}\n{case.source()}"


@pytest.mark.parametrize("seed", range(100, 110))
def test_on_the_emulator(seed):
    case = grow(seed)
    v = run.verdict(case, "emulator")
    assert not v.bad, f"{v.kind}: {v.text}\n{case.source()}"


def test_one_wrong_element_is_seen_and_the_case_shrinks(monkeypatch):
    def damaged(*a: object) -> list[np.ndarray]:
        out = [x.copy() for x in right(*a)]
        for x in out:
            if x.dtype == np.float32 and x.size:
                x.reshape(-1)[-1] += 1.0
        return out

    right = run._direct
    monkeypatch.setattr(run, "_direct", damaged)
    cases = [c for c in map(grow, range(40)) if c.transform == "" and len(c.lines) > 3]
    bad = [c for c in cases if run.verdict(c).kind == "differs"]
    assert bad
    small = shrink.shrink(bad[0], lambda c: run.verdict(c).kind == "differs")
    assert len(small.lines) < len(bad[0].lines)


# -------------------------------------------------------------------------------------------------------- the judge


def judged(f, have, *args, exact=False) -> str:
    """What the judge says of `have` as the first result of `f`."""
    want = np.asarray(jax.jit(f)(*args))
    reference = wide.Reference(f, jax.make_jaxpr(f)(*args), args)
    return judge.differs(np.asarray(have, want.dtype), want, exact, 0, reference)


def test_a_zero_may_have_the_sign_that_the_operations_give_it():
    """XLA takes 0 + x for x."""
    x = np.array([-0.0, 0.0, 1.0], np.float32)
    assert not judged(lambda x: jnp.sum(x[:0]) + x, [0.0, 0.0, 1.0], x, exact=True)
    assert judged(lambda x: x * 1, [0.0, 0.0, 1.0], x, exact=True)
    assert judged(lambda x: jnp.sum(x[:0]) + x, [0.0, 0.0, -1.0], x, exact=True)


@pytest.mark.parametrize("have", [np.nan, -np.inf])
def test_a_square_may_overflow_or_not(have):
    """As a fused multiplication and addition it does not."""

    def f(a, x):
        return a + x * x

    args = np.array([-np.inf, 1], np.float32), np.array([1e30, 2], np.float32)
    assert not judged(f, [have, 5], *args)
    assert judged(f, [1e30, 5], *args) and judged(f, [have, np.nan], *args)


def test_groups_of_a_convolution_do_not_meet():
    def f(x, w, groups):
        kind = {"feature_group_count": 2} if groups == "features" else {"batch_group_count": 2}
        return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), **kind)

    x, w = data(2, 5, 2), data(2, 1, 4)
    x[0, :, 0] = np.inf
    for groups, lhs, rhs in ("features", x, w), ("batches", x, data(2, 2, 4)):
        (exactly,) = wide.Reference(
            None, jax.make_jaxpr(functools.partial(f, groups=groups))(lhs, rhs), (lhs, rhs)
        ).exactly
        half = slice(2, 4)  # the second group
        part = (lhs[..., 1:], rhs[..., half]) if groups == "features" else (lhs[1:], rhs[..., half])
        want = lax.conv_general_dilated(*part, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        np.testing.assert_allclose(exactly[..., half], want, rtol=1e-5, atol=1e-5)


def test_roundings_before_a_cancellation():
    """The gradient of the sum of a softmax is zero, and its roundings are those of the numbers that cancel."""
    f = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * 0.5))
    x = data(16)
    error = np.zeros(16, np.float32)
    error[3] = 7e-9
    assert not judged(f, error, x)
    assert judged(f, error * 100, x)


def _sleeps(pipe, settings, stacks) -> None:
    """A worker whose case does not end, in the stage that `arch` names; compiled in small pieces, it does."""
    faulthandler.enable(file := open(stacks, "w"))  # noqa: SIM115
    seed, whole = pipe.recv()
    if not whole:
        pipe.send(("final", jobs.Answer(seed, "ok")))
    pipe.send((settings.arch, None))
    time.sleep(1000 if file else 0)


def hung(monkeypatch, stage: str) -> tuple[jobs._Worker, jobs.Answer | None]:
    monkeypatch.setattr(jobs, "_work", _sleeps)
    worker = jobs._Worker(jobs.Settings(arch=stage))
    assert worker.give(iter([7]))
    while worker.stage != stage:
        assert worker.answer() is None
        time.sleep(0.1)
    worker.until = 0.0
    return worker, worker.answer()


def test_a_hang_says_where(monkeypatch):
    _, answer = hung(monkeypatch, "own")
    assert answer.kind == "hang" and answer.seed == 7 and "in _sleeps" in answer.text


def test_a_hang_of_jit_is_refused(monkeypatch):
    assert hung(monkeypatch, "jit")[1] == jobs.Answer(7, "refused")


def test_a_hang_of_the_judge_is_tried_in_pieces(monkeypatch):
    worker, answer = hung(monkeypatch, "judge")
    while answer is None:
        time.sleep(0.1)
        answer = worker.answer()
    worker.end()
    assert answer == jobs.Answer(7, "ok")


def test_a_reference_in_pieces():
    def f(x):
        return jnp.cumsum(jnp.exp(x) @ x.T, 1)

    x = data(5, 5)
    whole, pieces = (wide.Reference(f, jax.make_jaxpr(f)(x), [x], whole) for whole in (True, False))
    for a, b in ((whole.exactly, pieces.exactly), (whole.rounded, pieces.rounded), (whole.shaken, pieces.shaken)):
        assert np.allclose(a[0], b[0], rtol=1e-12)


def test_padding_of_a_convolution_is_multiplied():
    """XLA:CPU leaves it out or does not, by the types: both are right."""

    def f(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), [(1, 0)])

    x, w = data(1, 1, 4), np.array([[[np.inf, 1.0]]], np.float32)
    (exactly,) = wide.Reference(f, jax.make_jaxpr(f)(x, w), [x, w]).exactly
    assert np.isnan(exactly[0, 0, 0]) and np.isinf(exactly[0, 0, 1:]).all()


def test_a_loop_without_iterations_has_a_reference():
    f = jax.grad(lambda x: jnp.sum(jax.lax.fori_loop(0, 0, lambda i, y: y * jnp.sin(x), x)))
    x = data(3)
    (exactly,) = wide.Reference(f, jax.make_jaxpr(f)(x), [x]).exactly
    assert np.array_equal(exactly, np.ones(3))
