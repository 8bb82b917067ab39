"""Convolutions and windows against XLA, in many arrangements of dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mpk import UnsupportedError, compiler, device
from jax_mpk.ir.expr import Load, Piece, Select, walk
from jax_mpk.ir.graph import Contract, Map
from jax_mpk.options import Options
from tests.execute import Runner
from tests.unit.lowering import close, graph_of, integers, normal, run_graph, same

NHWC = ("NHWC", "HWIO", "NHWC")
DIMS = st.sampled_from([
    ("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("CWN", "IWO", "NCW"), NHWC, ("NCHW", "OIHW", "NCHW"),
    ("NHWC", "OIHW", "NCHW"), ("HWNC", "IOHW", "CHWN"), ("CNHW", "HWOI", "NHWC"), ("NDHWC", "DHWIO", "NDHWC"),
    ("NCDHW", "OIDHW", "NDHWC"),
])  # fmt: skip


def _letters(dims):
    return [a for a in dims[0] if a not in "NC"]


@st.composite
def convolutions(draw):
    """A function of activation and kernel, and their shapes."""
    dims = draw(DIMS)
    space = _letters(dims)
    small = st.integers(1, 4 if len(space) == 3 else 7)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    images = draw(st.sampled_from([1, 1, 2])) if groups == 1 else 1
    size = {a: draw(small) for a in space} | {
        "N": images * draw(st.integers(1, 2)),
        "C": groups * draw(st.integers(1, 5)),
    }
    kernel = {a: draw(st.integers(1, 3)) for a in space}
    kernel |= {"I": size["C"] // groups, "O": groups * images * draw(st.sampled_from([1, 2, 9]))}
    steps = [[draw(st.sampled_from([1, 1, 2, 3])) for _ in space] for _ in range(3)]
    plain = steps[1] == [1] * len(space)
    padding = draw(st.sampled_from(["SAME", "VALID"])) if plain and draw(st.booleans()) else [
        (draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in space]  # fmt: skip

    def f(x, w):
        return lax.conv_general_dilated(x, w, steps[0], padding, steps[1], steps[2], dims, groups, images)

    return f, tuple(size[a] for a in dims[0]), tuple(kernel[a] for a in dims[1])


def _accepted(f, *args):
    """Whether JAX takes the function and its results have elements (a negative padding may leave none)."""
    try:
        return all(0 not in x.shape for x in jax.tree.leaves(jax.eval_shape(f, *args)))
    except (TypeError, ValueError):
        return False


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8]))
def test_convolution(case, dtype):
    f, x, w = case
    x, w = (normal(s, seed=n, scale=3.0).astype(dtype) for n, s in enumerate((x, w)))
    if _accepted(f, x, w):
        same(f, x, w, sums=True)


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.booleans())
def test_convolution_on_the_executor(case, gradient):
    """Through every pass and the verifier; gradients dilate activations and kernels, and pad by negative numbers."""
    f, x, w = case
    x, w = normal(x), normal(w, seed=1)
    if gradient:
        f = jax.grad(lambda x, w, f=f: (f(x, w) ** 2).sum(), (0, 1))
    if _accepted(f, x, w):
        for have, want in zip(Runner(f, x, w)(threads=2), jax.tree.leaves(jax.jit(f)(x, w)), strict=True):
            close(have, want, 32, sums=True)


def _compiled(f, *args):
    closed = jax.make_jaxpr(f)(*args)
    return compiler.compile(closed, device.CPU, Options(cache_entries=0, stop_after="refine")).stages["refine"]


@pytest.mark.parametrize("dims", [NHWC, ("NCHW", "OIHW", "NCHW")])
def test_patches_are_a_plain_contraction(dims):
    """Stride = kernel: one operator that reads activation and kernel where they are."""
    size, kernel = dict(N=1, H=8, W=12, C=3), dict(H=4, W=3, I=3, O=16)
    x, w = normal(tuple(size[a] for a in dims[0])), normal(tuple(kernel[a] for a in dims[1]))
    g = _compiled(lambda x, w: lax.conv_general_dilated(x, w, (4, 3), "VALID", dimension_numbers=dims), x, w)
    (op,) = g.ops
    assert isinstance(op, Contract) and {x.value for x in op.rhs} == {g.args[1]}
    assert isinstance(op.lhs, Load) and op.lhs.value == g.args[0] and all(c.dyn is None for c in op.lhs.coords)


def test_depthwise_is_a_sum_of_products():
    """One map, a term a place of the kernel, without a reduction or a question at run time."""
    x, w = normal((2, 20, 6)), normal((4, 1, 6))
    f = lambda x, w: jax.nn.silu(  # noqa: E731
        lax.conv_general_dilated(x, w, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6))  # fmt: skip
    (op,) = _compiled(f, x, w).ops
    assert isinstance(op, Map) and not op.expr.height and not any(isinstance(e, Select) for e in walk(op.expr))
    assert len({e for e in walk(op.expr) if isinstance(e, Load) and e.value == 1}) == 4


def test_padding_of_large_kernels_is_a_copy():
    x, w = normal((1, 9, 9, 16)), normal((3, 3, 16, 16))
    f = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)  # noqa: E731
    copy, op = _compiled(f, x, w).ops
    assert isinstance(copy, Map) and isinstance(op, Contract) and isinstance(op.lhs, Load)
    assert not any(isinstance(e, Piece | Select) for e in walk(op.lhs))


def test_transposed_convolution_multiplies_no_zeros():
    """A stride of 2 in two axes: four contractions, of together as many products as there are."""
    x, w = normal((1, 5, 5, 8)), normal((4, 4, 8, 6))
    g = _compiled(lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME"), x, w)
    parts = [op for op in g.ops if isinstance(op, Contract)]
    products = sum(int(np.prod(op.domain)) * int(np.prod([n for _, n in op.k])) for op in parts)
    assert len(parts) == 4 and products == 10 * 10 * 6 * 2 * 2 * 8


def test_rows_of_a_task_are_few_whatever_the_axes():
    """The outer axes of the rows (batch) go in single steps, so that what a task holds of the windows stays small."""
    x, w = normal((4, 40, 40, 8)), normal((3, 3, 8, 8))
    f = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=NHWC)  # noqa: E731
    c = compiler.compile(jax.make_jaxpr(f)(x, w), device.CPU, Options(cache_entries=0))
    (grid,) = c.stages["decompose"].grids
    assert np.prod(grid.tile[:3]) <= 64


# ------------------------------------------------------------------------------------------------------------- windows

OPS = {lax.max: -jnp.inf, lax.min: jnp.inf, lax.add: 0.0, lax.mul: 1.0}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows(data):
    draw = data.draw
    rank = draw(st.integers(1, 3))
    some = lambda *xs: tuple(draw(st.sampled_from(xs)) for _ in range(rank))  # noqa: E731
    shape, size, stride = some(1, 3, 4, 7), some(1, 2, 3), some(1, 1, 2, 3)
    base, dilation = some(1, 1, 2), some(1, 1, 2)
    padding = draw(st.sampled_from(["SAME", "VALID"])) if draw(st.booleans()) else [
        (draw(st.integers(-1, 3)), draw(st.integers(0, 2))) for _ in range(rank)]  # fmt: skip
    op = draw(st.sampled_from([*OPS, jnp.logaddexp]))
    init = OPS[op] if op in OPS and draw(st.booleans()) else 0.5 if op in OPS else -jnp.inf
    integer = draw(st.booleans()) and op is not jnp.logaddexp
    x = integers(shape, -9, 9) if integer else normal(shape)
    init = jnp.int32(3) if integer else init

    def f(x):
        return lax.reduce_window(x, init, op, size, stride, padding, base, dilation)

    if _accepted(f, x):
        same(f, x, ulps=16, sums=True)


@pytest.mark.parametrize("places", [4, 64, 65, 300])
def test_windows_of_every_size(places):
    """Terms, and beyond 64 places reductions; padded ones are copied first."""
    x = normal((2, 400), scale=2.0)
    f = lambda x: [  # noqa: E731
        lax.reduce_window(x, i, op, (1, places), (1, 3), "SAME") for op, i in ((lax.add, 0.0), (lax.max, -jnp.inf))]  # fmt: skip
    same(f, x, sums=True)
    for have, want in zip(Runner(f, x)(threads=2), jax.jit(f)(x), strict=True):
        close(have, want, 32, sums=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.uint8, jnp.bool_], ids=lambda d: d.__name__)
def test_windows_of_narrow_types(dtype):
    x = (normal((5, 6), scale=40) > 0) if dtype == jnp.bool_ else normal((5, 6), scale=40).astype(dtype)
    ops = [(lax.bitwise_or, False), (lax.bitwise_and, True)] if dtype == jnp.bool_ else [
        (lax.max, -100 if dtype != jnp.uint8 else 0), (lax.add, 0), (lax.mul, 1)]  # fmt: skip
    same(
        lambda x: [lax.reduce_window(x, jnp.array(i, dtype), op, (2, 3), (1, 2), "SAME") for op, i in ops], x, sums=True
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_extremes_of_windows_and_their_derivatives(data):
    """Gradients and tangents of pooling; in a gradient ties go to the first, and padding is never chosen."""
    draw = data.draw
    shape, size, stride = (
        tuple(draw(st.sampled_from(xs)) for _ in range(2)) for xs in ((1, 4, 5, 7), (1, 2, 3), (1, 2, 3))
    )
    padding = draw(st.sampled_from(["SAME", "VALID"])) if draw(st.booleans()) else [
        (draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(2)]  # fmt: skip
    op, init = draw(st.sampled_from([(lax.max, -jnp.inf), (lax.min, jnp.inf)]))
    x = normal(shape)
    pool = lambda x: lax.reduce_window(x, init, op, size, stride, padding)  # noqa: E731
    if not _accepted(pool, x):
        return
    t = normal(shape, seed=3)
    g = normal(jax.eval_shape(pool, x).shape, seed=4)
    same(lambda x, t: jax.jvp(pool, (x,), (t,))[1], x, t)
    for y in (x, jnp.round(x * 2)):
        same(lambda x, g: jax.vjp(pool, x)[1](g)[0], y, g, sums=True)


def test_windows_that_are_not_done():
    x = normal((70, 70))
    for f in (lambda x: lax.reduce_window(x, 0.0, jnp.logaddexp, (9, 9), (1, 1), "VALID"),
              jax.grad(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (9, 9), (9, 9), "VALID").sum())):  # fmt: skip
        with pytest.raises(UnsupportedError, match="window"):
            graph_of(f, x)


def test_stacked_pools_do_not_grow_into_each_other():
    """A map that is read at nine places is not computed nine times, nor its own nine operands eighty-one times."""
    x = normal((1, 40, 40, 4))

    def f(x):
        for _ in range(4):
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        return x

    g = _compiled(f, x)
    assert max(len(walk(e)) for op in g.ops for e in op.exprs().values()) < 400
    np.testing.assert_array_equal(Runner(f, x)(threads=2)[0], jax.jit(f)(x))


# ---------------------------------------------------------------------------------------------------------- ragged dots


@pytest.mark.parametrize("sizes", [[3, 0, 4, 2], [0, 0, 0, 0], [9, 0, 0, 0], [2, 1, 2, 1]])
def test_ragged_dot(sizes):
    """Rows beyond the last group are zero; gradients have groups of what is summed."""
    x, w, n = normal((9, 6)), normal((4, 6, 5)), jnp.array(sizes, jnp.int32)
    same(lax.ragged_dot, x, w, n, sums=True)
    same(lambda x, w, n: jax.grad(lambda x, w: (lax.ragged_dot(x, w, n) ** 2).sum(), (0, 1))(x, w), x, w, n, sums=True)
    same(lax.ragged_dot, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), n, sums=True)
    g = graph_of(lax.ragged_dot, x, w, n)
    (op,) = [op for op in g.ops if isinstance(op, Contract)]
    assert op.rhs[0].value == g.args[1] and len(op.k) == 2


def test_what_is_of_no_group_does_not_count():
    """The gradient of the weights is made of the rows of their group, whatever the other rows are."""

    def f(x, w, n, scale):
        return jax.grad(lambda w: (lax.ragged_dot(x, w, n) * scale).sum())(w)

    x, scale = np.array(normal((9, 6))), np.ones((9, 1), np.float32)
    x[8], scale[7] = np.nan, np.inf
    same(f, x, normal((4, 6, 5)), jnp.array([3, 0, 4, 0], jnp.int32), scale, sums=True)


def test_ragged_dot_of_many_rows_goes_to_xla():
    with pytest.raises(UnsupportedError, match="80 rows"):
        graph_of(lax.ragged_dot, normal((80, 6)), normal((4, 6, 5)), jnp.array([1, 2, 3, 4], jnp.int32))


def test_reductions_by_functions():
    x, i = normal((3, 37, 5)), integers((5, 300), 0, 1 << 30)
    same(lambda x: (lax.reduce(x, -jnp.inf, jnp.logaddexp, (1,)), lax.reduce(x, 2.0, lax.add, (0, 2)),
                    lax.reduce(x, 0.5, lax.max, (1,))), x, ulps=16)  # fmt: skip
    same(lambda i: (lax.reduce_xor(i, (0,)), lax.reduce_xor(i, (1,)), lax.reduce_xor(i, (0, 1))), i)
    same(lambda x: lax.reduce_xor(x, (1,)), normal((4, 20)) > 0)

    def pair(a, b):
        keep = a[0] >= b[0]
        return lax.select(keep, a[0], b[0]), lax.select(keep, a[1], b[1])

    same(lambda x: lax.reduce((x, x * 2), (-jnp.inf, 0.0), pair, (1,)), x)
    assert run_graph(graph_of(lambda x: lax.reduce(x[:0], 4.0, lax.add, (0,)), x[0, 0]), x[0, 0])[0] == 4
