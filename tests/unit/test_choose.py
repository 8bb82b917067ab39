"""`implementation=None`: what is predicted, what is chosen, and that it is what runs."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mpk
from benchmarks.cases import CASES
from jax_mpk import cuts, device, megakernelize
from jax_mpk.errors import UnsupportedError
from jax_mpk.options import Options
from jax_mpk.predict import apart, builtin, calibrate, model, operators, xla
from jax_mpk.predict.choose import choose, floor
from jax_mpk.predict.constants import Rate, Side
from jax_mpk.predict.piece import Piece, dump, parse

TWO = device.cpu(2)
CPU = builtin.constants(TWO)
H100 = builtin.constants(device.H100, "NVIDIA H100 80GB HBM3")
BF16 = jnp.bfloat16
ON = {"choose": True, "cache_dir": ""}
S = jax.ShapeDtypeStruct
RNG = np.random.default_rng(5)


def block(x, w, v):
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + jnp.tanh(h @ w) @ v


def arrays(rows, width=512, hidden=2048, dtype=BF16):
    make = lambda *shape: jnp.asarray(RNG.normal(size=shape) / math.sqrt(shape[0]), dtype)
    return make(rows, width), make(width, hidden), make(hidden, width)


def chosen(fn, *operands, target=TWO, constants=CPU):
    """The choice for shapes alone."""
    spec = jax.tree.map(lambda x: S(x.shape, x.dtype), operands)
    jaxpr = jax.make_jaxpr(fn)(*spec)
    return choose(jaxpr, constants, lambda: operators.operators(jaxpr, target, Options(cache_dir="")))


def text(fn, *operands, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return jax.jit(megakernelize(fn, options={**ON, **options})).lower(*operands).as_text()


# ---------------------------------------------------------------------------------------------------------- the choice

TO_MEGAKERNEL = [
    "qwen3-130m/4 bf16 batch 1",
    "qwen3-130m/4 bf16 batch 8",
    "qwen3-130m/4 f32 batch 1",
    "qwen3-tiny bf16 batch 1",
    "cumsum 65536",
]
TO_XLA = ["qwen3-130m/2 f32 prefill 128", "add 8", "add 4194304", "mlp step 64 x 256", "mlp step 512 x 512", "mlp tiny",
          "matmul f32 4096 x 512", "matmul bf16 512 x 1024", "conv 3 x 3", "rms norm 4096 x 1024"]  # fmt: skip


@pytest.mark.parametrize("name", [*TO_MEGAKERNEL, *TO_XLA])
def test_cpu_chooses(name):
    fn, operands = CASES[name].make()
    assert chosen(fn, *operands).to_xla == (name in TO_XLA)


def wide_step(layers, rows, width=2048, hidden=8192, heads=32, groups=8, slots=1000, dtype=BF16):
    """A decoder of Llama-3.2-1B's shape on `rows` sequences of one token, and its operands' shapes."""
    d = width // heads
    p = {"q": S((width, width), dtype), "kv": S((width, 2 * groups * d), dtype), "o": S((width, width), dtype),
         "gate": S((width, hidden), dtype), "up": S((width, hidden), dtype), "down": S((hidden, width), dtype)}  # fmt: skip
    norm = lambda x: (x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)).astype(
        dtype
    )

    def step(x, params, cache, pos):
        out = []
        for w, (k, v) in zip(params, cache, strict=True):
            h = norm(x)
            q = (h @ w["q"]).reshape(rows, groups, heads // groups, d)
            new = (h @ w["kv"]).reshape(rows, 1, 2 * groups, d)
            k = lax.dynamic_update_slice(k, new[:, :, :groups], (0, pos, 0, 0))
            v = lax.dynamic_update_slice(v, new[:, :, groups:], (0, pos, 0, 0))
            s = jnp.einsum("bgnd,bsgd->bgns", q, k, preferred_element_type=jnp.float32) * 0.1
            s = jax.nn.softmax(jnp.where(jnp.arange(slots) <= pos, s, -1e30), -1).astype(dtype)
            x = x + jnp.einsum("bgns,bsgd->bgnd", s, v).reshape(rows, width) @ w["o"]
            h = norm(x)
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
            out.append((k, v))
        return x, out

    cache = [(S((rows, slots, groups, d), dtype),) * 2] * layers
    return step, (S((rows, width), dtype), [p] * layers, cache, S((), jnp.int32))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_decode_step_is_a_megakernel_on_an_h100(rows):
    step, operands = wide_step(6, rows)
    c = chosen(step, *operands, target=device.H100, constants=H100)
    assert not c.to_xla and not c.bound


def apart_on_an_h100(fn, *operands):
    """The pieces that an H100 gets."""

    def slow(eqn, alone):
        if not apart.watched(eqn):
            return False
        one = alone()
        return apart.slower(one, H100, lambda: operators.operators(one, device.H100, Options(cache_dir="")))

    return cuts.cut(jax.make_jaxpr(fn)(*operands), "cuda", slow)


def test_xla_sorts_the_vocabulary_for_a_megakernel_on_an_h100():
    def step(x, w, p):
        logits = (x @ w).astype(jnp.float32)
        order = jnp.sort(logits, -1)[:, ::-1]
        kept = jnp.sum(jnp.cumsum(jax.nn.softmax(order), -1) < p, -1, keepdims=True)
        return jnp.where(logits >= jnp.take_along_axis(order, kept, -1), logits, -jnp.inf)

    found = apart_on_an_h100(step, S((1, 2048), BF16), S((2048, 128256), BF16), 0.9)
    theirs = [e.primitive.name for p in found.pieces if p.kind == "xla" for e in p.jaxpr.jaxpr.eqns]
    assert "sort" in theirs and "dot_general" not in theirs and not found.gaps


@pytest.mark.parametrize("slots, cut", [(4, False), (5000, True)])
def test_a_scatter_is_apart_where_many_stores_wait_for_each_other(slots, cut):
    update = lambda x, at, y: jnp.tanh(x.at[at].add(y))
    found = apart_on_an_h100(update, S((1000, 64), jnp.float32), S((slots,), jnp.int32), S((slots, 64), jnp.float32))
    assert (found is not None) == cut


def test_what_xla_does_much_faster_is_cut_out():
    """A chain that is a megakernel, behind a scatter that is none; an implementation that was named does all of it."""

    def f(x, layers, table, at, rows):
        table = table.at[at].add(rows)
        y = x + table[:1].astype(x.dtype)
        for w, v in layers:
            y = block(y, w, v)
        return y

    x, w, v = arrays(1, 512, 4096)
    table, rows = RNG.normal(size=(1000, 512)).astype("float32"), RNG.normal(size=(2000, 512)).astype("float32")
    operands = x, [(w, v)] * 4, table, RNG.integers(0, 1000, 2000).astype("int32"), rows
    lowered = text(f, *operands)
    assert lowered.count("@jax_mpk_cpu") == 1 and "stablehlo.scatter" in lowered
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = jax.jit(megakernelize(f, options=ON))(*operands)
    np.testing.assert_allclose(got.astype("float32"), jax.jit(f)(*operands).astype("float32"), rtol=0.05, atol=0.05)
    assert "XLA: scatter-add" in megakernelize(f, options=ON).explain(*operands)
    named = jax.jit(megakernelize(f, implementation="cpu", options=ON)).lower(*operands).as_text()
    assert named.count("@jax_mpk_cpu") == 1 and "stablehlo.scatter" not in named


@pytest.mark.parametrize("rows", [64, 512])
def test_many_rows_go_to_xla_on_an_h100_without_compiling(rows):
    _, x, w, v = None, S((rows, 2048), BF16), S((2048, 8192), BF16), S((8192, 2048), BF16)
    jaxpr = jax.make_jaxpr(block)(x, w, v)
    c = choose(jaxpr, H100, lambda: pytest.fail("nothing is compiled for this"))
    assert c.to_xla and c.bound


@pytest.mark.parametrize("name", ["add 8", "add 4194304", "mlp step 512 x 512", "matmul f32 4096 x 512", "softmax 4096 x 1024",
                                  "cumsum 65536", "argmax 8 x 32000",
                                  "mlp step tiny", "attention tiny"])  # fmt: skip
def test_an_h100_leaves_these_to_xla(name):
    fn, operands = CASES[name].make()
    assert chosen(fn, *operands, target=device.H100, constants=H100).to_xla


def test_code_without_tensor_copies_is_for_one_row_only():
    target = device.cuda("sm_80", 132)
    constants = builtin.constants(target, "NVIDIA H100 80GB HBM3")
    one, eight = (chosen(*((s := wide_step(2, rows))[0], *s[1]), target=target, constants=constants) for rows in (1, 8))
    assert one.megakernel.us < eight.megakernel.us / 1.5 and eight.to_xla


def test_xla_means_no_custom_call_and_no_warning():
    x, y = arrays(1, 8)[:2]
    assert "custom_call" not in text(lambda x: x * 2 + 1, x)
    plain = jax.jit(megakernelize(lambda x: x * 2 + 1, implementation="xla")).lower(x).as_text()
    assert text(lambda x: x * 2 + 1, x) == plain


def test_a_megakernel_where_it_wins_and_it_computes_the_same():
    operands = arrays(1)
    assert text(block, *operands).count("jax_mpk_cpu") == 1
    got = jax.jit(megakernelize(block, options=ON))(*operands)
    np.testing.assert_allclose(got.astype("float32"), block(*operands).astype("float32"), rtol=0.05, atol=0.05)


def test_the_knob_and_the_names_choose_nothing():
    x = jnp.asarray(RNG.normal(size=8), jnp.float32)
    fn = lambda x: x * 2 + 1
    assert "jax_mpk_cpu" in text(fn, x, choose=False)
    assert "jax_mpk_cpu" in jax.jit(megakernelize(fn, implementation="cpu", options=ON)).lower(x).as_text()
    operands = arrays(1)
    assert (
        "custom_call" not in jax.jit(megakernelize(block, implementation="xla", options=ON)).lower(*operands).as_text()
    )


def test_the_environment_has_the_knob(monkeypatch):
    x = jnp.asarray(RNG.normal(size=8), jnp.float32)
    monkeypatch.setenv("JAX_MPK_CHOOSE", "1")
    assert "custom_call" not in jax.jit(megakernelize(lambda x: x * 2)).lower(x).as_text()
    monkeypatch.setenv("JAX_MPK_CHOOSE", "off")
    assert "jax_mpk_cpu" in jax.jit(megakernelize(lambda x: x * 3)).lower(x).as_text()


def test_what_cannot_be_a_megakernel_still_warns_where_it_would_be_one():
    fn = lambda x, w, v: (block(x, w, v), jnp.linalg.cholesky(jnp.eye(4)))
    with pytest.warns(jax_mpk.MegakernelWarning, match="cholesky"):
        jax.jit(megakernelize(fn, options=ON)).lower(*arrays(1)).as_text()


def test_derivatives_and_batches_are_chosen_by_what_they_are():
    x, w, v = arrays(1)
    loss = lambda x: jnp.sum(megakernelize(block, options=ON)(x, w, v).astype(jnp.float32))
    assert jax.grad(loss)(x).shape == x.shape
    many = jnp.asarray(RNG.normal(size=(4096, 1, 512)), BF16)
    mapped = jax.vmap(megakernelize(block, options=ON), (0, None, None))
    assert "custom_call" not in jax.jit(mapped).lower(many, w, v).as_text()
    assert "jax_mpk_cpu" in jax.jit(mapped).lower(many[:2], w, v).as_text()


# ------------------------------------------------------------------------------------------------- compiling, and caches


def test_obviously_wide_functions_are_not_compiled(counted):
    text(block, *(S(x.shape, x.dtype) for x in arrays(512)))
    assert not counted


def test_a_chosen_megakernel_is_compiled_once(counted):
    operands = arrays(1, hidden=1536)
    text(block, *operands)
    assert len(counted) == 1


def test_the_pieces_come_from_disk(tmp_path, counted):
    operands = arrays(1, hidden=1280)
    for _ in range(3):
        text(block, *operands, cache_dir=str(tmp_path))
        jax_mpk.compiler.clear_cache()
        operators.clear()
    assert len(counted) == 1 and len(list(tmp_path.glob("*.work"))) == 1
    (file,) = tmp_path.glob("*.work")
    for damage in (b"", b"{}", file.read_bytes()[:-3], file.read_bytes()[:32] + b'[["rows", 3]]', os.urandom(99)):
        file.write_bytes(damage)
        operators.clear()
        assert "jax_mpk_cpu" in text(block, *operands, cache_dir=str(tmp_path))
        assert parse(file.read_bytes()[32:])


def test_pieces_survive_being_written():
    step, operands = wide_step(1, 1)
    jaxpr = jax.make_jaxpr(step)(*operands)
    made = operators.operators(jaxpr, device.H100, Options(cache_dir=""))
    assert made and parse(dump(made)) == made
    for bad in (b"", b"3", b"[[]]", b'[["rows"]]', dump(made).replace(b'"', b"1", 1)):
        with pytest.raises(ValueError):
            parse(bad)


def test_the_choice_is_the_same_every_time_and_in_every_process():
    code = (
        "import jax, jax.numpy as jnp; from tests.unit.test_choose import chosen, wide_step, H100, device\n"
        "s = wide_step(1, 4)\n"
        "for t, c in ((device.cpu(2), None), (device.H100, H100)):\n"
        "    x = chosen(s[0], *s[1], **({} if c is None else dict(target=t, constants=c)))\n"
        "    print(x.to_xla, repr(x.xla), repr(x.megakernel))\n"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
                           env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout
            for seed in ("1", "2")}  # fmt: skip
    assert len(runs) == 1 and runs.pop().count("Time(") == 4


# -------------------------------------------------------------------------------------------------------------- the model


def matmul(rows, k=1024, n=1024, dtype=jnp.float32):
    return (lambda x, w: x @ w), S((rows, k), dtype), S((k, n), dtype)


def both(fn, *operands, target=TWO, constants=CPU):
    jaxpr = jax.make_jaxpr(fn)(*operands)
    ops = operators.operators(jaxpr, target, Options(cache_dir=""))
    return model.xla(xla.pieces(jaxpr), constants).us, model.megakernel(ops, constants).us


@pytest.mark.parametrize(("target", "constants"), [(device.cpu(2), CPU), (device.H100, H100)], ids=["cpu", "h100"])
@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_more_work_takes_longer(target, constants, dtype):
    ask = lambda *size: both(*matmul(*size, dtype=dtype), target=target, constants=constants)
    for sizes in ([(m, 1024, 1024) for m in (4, 8, 32, 256, 2048)], [(1, k, 2048) for k in (512, 2048, 8192)]):
        times = np.array([ask(*s) for s in sizes])  # one row is another path, with other overheads
        assert (times[1:] >= 0.95 * times[:-1]).all() and (times[-1] > times[0]).all()


def test_more_layers_take_longer_and_proportionally():
    times = [both(*((s := wide_step(n, 1))[0], *s[1]), target=device.H100, constants=H100) for n in (1, 2, 4)]
    for one, two, four in zip(*times, strict=True):
        assert one < two < four and four - two == pytest.approx(2 * (two - one), rel=0.05)


@pytest.mark.parametrize(("target", "constants"), [(TWO, CPU), (device.H100, H100)], ids=["cpu", "h100"])
def test_the_bound_is_one(target, constants):
    """What is known before compiling is never more than what is predicted after it."""
    for name, case in CASES.items():
        if case.large or case.kind in ("decode", "prefill", "other"):
            continue
        fn, operands = case.make()
        jaxpr = jax.make_jaxpr(fn)(*operands)
        try:
            ops = operators.operators(jaxpr, target, Options(cache_dir=""))
        except UnsupportedError:
            continue
        least, predicted = floor(jaxpr, xla.pieces(jaxpr), constants).us, model.megakernel(ops, constants).us
        assert least <= 1.01 * predicted, (name, least, predicted)


def test_constants_move_the_choice():
    operands = [S(x.shape, x.dtype) for x in arrays(1)]
    assert not chosen(block, *operands).to_xla
    slow = dataclasses.replace(CPU, mpk=dataclasses.replace(CPU.mpk, start=1e6))
    assert chosen(block, *operands, constants=slow).to_xla
    assert chosen(block, *operands, constants=dataclasses.replace(CPU, margin=100.0)).to_xla
    assert chosen(block, *operands, constants=dataclasses.replace(CPU, gain=1e5)).to_xla


def test_a_short_launch_stays_in_the_calling_thread():
    c = dataclasses.replace(CPU, workers=8)
    op = lambda scalar: [Piece("rows", "x", 0, 0, 0, 1, scalar, tasks=8)]
    short, long = model.megakernel(op(100), c), model.megakernel(op(10**7), c)
    assert short.launch == c.mpk.start and long.launch == c.mpk.start + c.hop
    alone = dataclasses.replace(c, alone=math.inf)
    assert model.megakernel(op(10**7), alone).work == pytest.approx(8 * long.work)


def test_turns_of_tasks():
    """What 96 tasks do on 132 workers takes 132 / 96 as long, but for what the others stream ahead."""
    time = lambda tasks, c, size=10**9: model.operator(Piece("contract bf16", "w", size, tasks=tasks), c, 132).bytes
    none = dataclasses.replace(H100, ahead=0)
    assert time(96, none) == pytest.approx(time(132, none) * 132 / 96)
    assert time(192, none) == pytest.approx(time(264, none) * 264 / 192)
    assert time(132, none) < time(96, H100) < time(96, none)
    assert time(96, H100, 10**6) == time(132, H100, 10**6)  # fits into the rings


def test_rates_by_rows_and_by_name():
    side = Side(1.0, {"": (Rate(9),), "dot": (Rate(1, rows=4), Rate(2)), "dot i8": (Rate(3),)})
    assert [side.rate(*a).us for a in (("dot f32", 4), ("dot f32", 5), ("dot i8", 1), ("odd", 1))] == [1, 2, 3, 9]


def kinds(fn, *operands):
    return [p.how for p in xla.pieces(jax.make_jaxpr(fn)(*operands))]


def test_kernels_of_xla():
    x, w = S((8, 64), jnp.float32), S((64, 64), jnp.float32)
    assert kinds(lambda x: jnp.tanh(x) * 2 + 1, x) == ["fusion"]
    assert kinds(lambda x, w: x @ w.T, x, w) == ["dot float32"]
    assert sorted(kinds(lambda x, w: jnp.tanh(x @ w) * 2, x, w)) == ["dot float32", "fusion"]
    assert kinds(lambda x: jnp.sum(x * x, -1), x) == ["reduce", "fused"]
    assert sorted(kinds(jax.nn.softmax, x)) == ["fusion", "reduce", "reduce"]
    assert kinds(lambda x: (jnp.sort(x), x @ jnp.ones((64, 9)))[0], x) == ["sort"]  # what nobody needs is not counted
    assert kinds(jax.jit(lambda x: x.reshape(64, 8)), x) == []
    assert kinds(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), S((4, 8, 8), BF16), S((4, 8, 8), BF16)) == ["batched"]


def test_loops_count_as_often_as_they_run():
    loop = lambda x: lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, 7)[0]
    pieces = xla.pieces(jax.make_jaxpr(loop)(S((8, 8), jnp.float32)))
    assert {p.how: p.count for p in pieces} == {"loop": 7, "dot float32": 7, "fusion": 7}


def test_one_branch_of_a_condition_runs():
    branch = lambda p, x: lax.cond(p, lambda x: jnp.tanh(x @ x) @ x, lambda x: x @ x, x)
    pieces = xla.pieces(jax.make_jaxpr(branch)(S((), jnp.bool_), S((8, 8), jnp.float32)))
    assert sum(p.how == "dot float32" for p in pieces) == 1


def test_gathers_read_what_they_take():
    (p,) = xla.pieces(jax.make_jaxpr(lambda w, i: w[i])(S((32000, 256), jnp.float32), S((4,), jnp.int32)))
    assert p.read < 10_000
    jaxpr = jax.make_jaxpr(lambda w, i: w[i] * 2)(S((32000, 256), jnp.float32), S((4,), jnp.int32))
    assert sum(p.read for p in operators.operators(jaxpr, device.cpu(2), Options(cache_dir=""))) < 10_000


def test_reductions_of_rows_are_counted_once():
    """Every element of a normalised row does not add up the row again."""
    jaxpr = jax.make_jaxpr(lambda x: (x - x.mean(-1, keepdims=True)) * 2)(S((64, 1024), jnp.float32))
    assert sum(p.scalar for p in operators.operators(jaxpr, device.cpu(2), Options(cache_dir=""))) < 10 * 64 * 1024


def test_steps_through_memory_are_strided():
    how = lambda fn, *shape: {p.how for p in operators.operators(jax.make_jaxpr(fn)(S(shape, jnp.float32)), device.cpu(2),
                                                                 Options(cache_dir=""))}  # fmt: skip
    assert how(lambda x: x.sum(0), 256, 256) == {"strided"} and how(lambda x: x.sum(1), 256, 256) == {"rows"}
    assert how(lambda x: x.T + 1.0, 256, 256) == {"strided"}


# ---------------------------------------------------------------------------------------------------------------- in words


def test_explain_says_what_was_predicted_and_why():
    operands = arrays(1)
    said = megakernelize(block, options=ON).explain(*operands)
    assert said.startswith("implementation=None: a megakernel (") and "dot bfloat16" in said and "contract bf16" in said
    for word in ("XLA: ", "megakernel: ", "launches", "bytes", "hops", "constants: CPU, built in", "\nblock for cpu: "):
        assert word in said
    said = megakernelize(block, options=ON).explain(*arrays(512))
    assert (
        said.startswith("implementation=None: XLA (")
        and "at least" in said
        and "the megakernel would be block for cpu" in said
    )


def test_explain_of_a_name_predicts_nothing():
    for options, implementation in ((ON, "cpu"), ({"choose": False}, None)):
        said = megakernelize(block, implementation=implementation, options=options).explain(*arrays(1))
        assert said.startswith("block for cpu: ")


def test_predict():
    f = megakernelize(block, options=ON)
    c = f.predict(*arrays(1))
    assert not c.to_xla and 0 < c.megakernel.us < c.xla.us
    assert f.predict(*arrays(512)).to_xla
    with pytest.raises(UnsupportedError, match="nothing"):
        megakernelize(lambda x: x, options=ON).predict(1.0)


def test_the_commands(tmp_path):
    run = lambda *args: subprocess.run([sys.executable, "-m", "jax_mpk", *args], capture_output=True, text=True, timeout=300,
                                       env={**os.environ, "JAX_MPK_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"})  # fmt: skip
    assert "JAX_MPK_CHOOSE" in run().stdout
    said = run("constants").stdout
    assert "built in" in said and "contract bf16" in said
    done = run("calibrate", "--platform", "cpu")
    assert done.returncode == 0 and "measured" in done.stdout
    assert "measured" in run("constants").stdout
    assert run("calibrate", "--platform", "tpu").returncode == 2


# ------------------------------------------------------------------------------------------------------------- calibration


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing known in this process, a directory, and measurements that take no time."""
    monkeypatch.setattr(calibrate, "_known", {})
    calls = []
    monkeypatch.setattr(
        calibrate, "measure", lambda *a: calls.append(1) or {"xla dot float32": 2.0, "mpk rows": 0.5, "xla start": 3.0}
    )
    return calls, tmp_path


def test_measured_constants_are_kept(fresh, monkeypatch):
    calls, path = fresh
    options, target = Options(cache_dir=str(path)), device.cpu(2)
    monkeypatch.setattr(jax_mpk.backends.get("cpu"), "device", lambda o: target)
    assert calibrate.constants(target, options).source == CPU.source  # nothing is measured unasked
    made = calibrate.calibrate("cpu", options)
    one = made.xla.rate("dot float32", 1), CPU.xla.rate("dot float32", 1)
    assert one[0].bandwidth == one[1].bandwidth / 2 and one[0].work == one[1].work
    assert made.mpk.rate("rows").work == 2 * CPU.mpk.rate("rows").work and made.xla.start == 3 * CPU.xla.start
    assert calibrate.constants(target, options) is made
    monkeypatch.setattr(calibrate, "_known", {})
    assert calibrate.constants(target, options) == made and len(calls) == 1
    assert calibrate.constants(device.cpu(4), options).source != made.source  # another device
    (file,) = path.glob("*" + calibrate.SUFFIX)
    good = file.read_bytes()
    for damage in (b"", good[:-1], good[:32] + b"[1]", good[:32] + json.dumps({"xla start": 1e9}).encode(),
                   good[:32] + json.dumps({"xla start": "x"}).encode(), os.urandom(64)):  # fmt: skip
        file.write_bytes(damage)
        monkeypatch.setattr(calibrate, "_known", {})
        assert calibrate.constants(target, options).source == CPU.source
        file.write_bytes(good)


def test_a_directory_that_cannot_be_written(fresh, monkeypatch):
    _, path = fresh
    blocked = path / "file"
    blocked.write_text("")
    with pytest.warns(jax_mpk.MegakernelWarning, match="not kept"):
        made = calibrate.calibrate("cpu", Options(cache_dir=str(blocked / "below")))
    assert made.source.startswith("measured")
    assert calibrate.calibrate("cpu", Options(cache_dir="")).source.startswith("measured")


def test_many_at_once(fresh):
    _, path = fresh
    options, found = Options(cache_dir=str(path)), []
    run = lambda n: found.append(
        calibrate.calibrate("cpu", options) if n % 2 else calibrate.constants(device.cpu(os.cpu_count()), options)
    )
    threads = [threading.Thread(target=run, args=(n,)) for n in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(found) == 16 and len(list(path.glob("*" + calibrate.SUFFIX))) == 1
    assert not list(path.glob(".new-*"))


def test_what_is_measured_is_about_the_device(monkeypatch):
    """Factors of a device that is exactly as slow as predicted are 1; what is too far off is cut."""
    monkeypatch.setattr(calibrate, "_fastest", lambda *a, **k: 1e12)
    factors = calibrate.measure("cpu", CPU, device.cpu(2), Options(cache_dir=""), 0.0)
    assert factors and set(factors.values()) == {calibrate.MOST}
    assert {f.split(" ", 1)[0] for f in factors} == {"xla", "mpk"}
    for name in factors:
        side, how = name.split(" ", 1)
        assert how in getattr(CPU, side).rates and how in getattr(H100, side).rates


# --------------------------------------------------------------------------------------------------------- the benchmark


def test_there_are_functions_of_every_kind():
    kinds = {c.kind for c in CASES.values()}
    assert sum(not c.large for c in CASES.values()) >= 60
    assert kinds >= {"elementwise", "norm", "reduction", "matmul", "integer", "attention", "gather", "scatter", "sort", "scan", "window",
                     "mlp", "training", "batched", "decode", "prefill"}  # fmt: skip


def test_the_benchmark(tmp_path, capsys):
    from benchmarks import choose as benchmark

    file = tmp_path / "rows.json"
    quick = ["--platform", "cpu", "--turn", "0.001", "--turns", "1", "--again", "0", "--json", str(file)]
    benchmark.main([*quick, "--only", "add 8", "--only", "mlp bf16 1 x 1024", "--only", "solve 64"])
    said = capsys.readouterr().out
    assert said.count("functions, 1 as megakernels") == 1 and "xla, the same" in said
    rows = {r["case"]: r for r in json.loads(file.read_text())["rows"]}
    assert rows["add 8"]["same"] and not rows["add 8"]["megakernel"] and rows["mlp bf16 1 x 1024"]["megakernel"]
    assert set(rows["add 8"]["us"]) == {"jit", "none", "named"} and set(rows["solve 64"]["us"]) == {"jit", "none"}
    assert rows["add 8"]["prediction"]["bound"] and rows["solve 64"]["error"].startswith("UnsupportedError")


def test_what_counts_as_slower():
    from benchmarks import choose as benchmark

    row = {"case": "x", "ratio": 1.2, "same": False, "megakernel": True, "missed": False, "us": {"jit": 1.0}}
    assert (
        benchmark.slower(row)
        and not benchmark.slower(row | {"same": True})
        and not benchmark.slower(row | {"ratio": 1.04})
    )
    said = benchmark.summary([row, row | {"same": True, "megakernel": False}])
    assert "> 1.05 x jit: 1" in said and "noise alone, since both are one program: 1" in said
