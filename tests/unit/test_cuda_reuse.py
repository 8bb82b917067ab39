"""CUDA source of codes with reductions: memory is waited for once, and nothing runs before what it needs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jax_mpk import abi
from jax_mpk.backends.cuda.build import text
from jax_mpk.device import H100
from tests import execute


def after_reduction(f, *args) -> list[str]:
    """For every code with a reduction, the lines after its last one."""
    blob = execute.Runner(f, *args, target=H100).blob
    source = text(abi.decode(blob))
    bodies = re.findall(r"^struct V\d+ \{.*?^\};", source, re.M | re.S)
    codes = [x for body in bodies for x in body.split("static __device__") if re.search(r"= reduce(_extreme)?<", x)]
    assert codes, "no reduction"
    return [re.split(r"= reduce(?:_extreme)?<", x)[-1] for x in codes]


def norm(x, w):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * w


def weights(*shape):
    return jnp.ones(shape, jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 8])
def test_weights_of_a_norm_do_not_wait_for_its_sum(rows):
    for tail in after_reduction(lambda x, w: norm(x, w), weights(rows, 2048), weights(2048)):
        assert "load<" not in tail and re.search(r"\be\d+\[u\]", tail)


@pytest.mark.parametrize("columns", [4096, 16384], ids=["in slices", "whole"])
def test_a_prologue_reads_before_its_sum(columns):
    f = lambda x, w, m: norm(x, w) @ m  # noqa: E731
    for tail in after_reduction(f, weights(1, 2048), weights(2048), weights(2048, columns)):
        assert "load<" not in tail


def test_a_row_chosen_by_a_reduction_is_read_after_it():
    f = lambda x, t: t[jnp.argmax(x)] + t[0]  # noqa: E731
    (tail,) = after_reduction(f, weights(512), weights(512, 1024))
    assert len(re.findall("load<", tail)) == 1 and "clamp_to" in tail and re.search(r"\be\d+\[u\]", tail)


def test_operations_of_constants_are_computed():
    """NVRTC 13.0 takes it that `-inf - -inf` is no NaN; a window that begins in the padding had that."""
    f = lambda x: jax.lax.reduce_window(x, -jnp.inf, jnp.logaddexp, (3,), (1,), "SAME", (1,), (2,))  # noqa: E731
    source = text(abi.decode(execute.Runner(f, jnp.ones(17), target=H100).blob))
    body = "".join(re.findall(r"^struct V\d+ \{.*?^\};", source, re.M | re.S))
    assert "F_NE(" in body and not re.search(r"[FIUB]_\w+\(0x\w+u(, 0x\w+u)?\)", body)


def test_no_more_than_registers_hold():
    f = lambda x, *w: sum((norm(x, v) * v for v in w), x)  # noqa: E731
    tails = after_reduction(f, weights(1, 4096), *[weights(4096)] * 4)
    assert any("load<" in tail for tail in tails)
    assert not any(re.search(r"\be\d+\[u\]", tail) for tail in tails)


def written(f, *args) -> str:
    """What the program adds to the shell."""
    source = text(abi.decode(execute.Runner(f, *args, target=H100).blob))
    return source[source.index("struct V0") :]


@pytest.mark.parametrize(
    ("f", "args", "widths"),
    [
        (lambda x, y: jax.nn.silu(x) * y, (weights(1056, 1024), weights(1056, 1024)), {"BF16, 8"}),
        (lambda x, y: x.astype(jnp.float32) * y, (weights(528, 1024), jnp.ones((528, 1024))), {"BF16, 8", "F32, 8"}),
        (lambda x: x[:, 8:] + 1, (weights(1056, 1024),), {"BF16, 8"}),
        (lambda x: x[:, 4:] + 1, (weights(1056, 1020),), {"BF16, 4"}),
        (lambda x: x[:, 1:] + 1, (weights(1056, 1025),), set()),
        (lambda x: x.T + 1, (weights(1024, 1056),), set()),
        (lambda x: x * 2, (weights(1, 512),), set()),
    ],
    ids=["bf16", "two types", "later", "later, by 4", "odd", "transposed", "few"],
)
def test_neighbours_are_loaded_at_a_time_where_they_lie_together(f, args, widths):
    assert set(re.findall(r"Wide<([A-Z0-9]+, \d)>", written(f, *args))) == widths


def test_copies_move_bits():
    """And take neighbours however few there are."""
    code = written(lambda x: jnp.concatenate([x, x], 1), weights(2, 64))
    assert "Wide<BF16, 8>" in code and "y.set(" not in code and "ROUND" not in code


@pytest.mark.parametrize(("variants", "inline"), [(12, "__forceinline__"), (60, "__noinline__")])
def test_many_variants_are_functions_of_their_own(variants, inline):
    """As one function they take ptxas minutes."""
    shapes = [weights(1, 8 + n) for n in range(variants)]
    code = written(lambda *xs: [jnp.tanh(x) + 1 for x in xs], *shapes)
    assert set(re.findall(r"__device__ (\w+) void run_", code)) == {inline}
