"""The primitive under JAX's transformations, with XLA and with the CPU executor behind it."""

import functools
import os
import re
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import abi, backends, megakernelize
from jax_mpk.backends.cuda import nvrtc

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 32)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(32, 48)), jnp.float32)
V = jnp.asarray(RNG.normal(size=(48, 32)), jnp.float32)


@pytest.fixture(params=["xla", "cpu"])
def mk(request):
    """`megakernelize` with a named implementation: "cpu" raises where it could not compile."""
    return functools.partial(megakernelize, implementation=request.param)


def block(x, w, v):
    """A normalised, gated block with a residual: two contractions, a row reduction, maps."""
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + jnp.tanh(h @ w) @ v


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


def test_eager_and_jit(mk):
    f = mk(block)
    close(f(X, W, V), block(X, W, V))
    close(jax.jit(f)(X, W, V), block(X, W, V))


def test_without_a_name_the_platform_decides():
    f = jax.jit(megakernelize(block))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f.lower(X, W, V).as_text().count("jax_mpk_cpu") == 1
        close(f(X, W, V), block(X, W, V))
    assert "jax_mpk_cpu" not in jax.jit(megakernelize(block, implementation="xla")).lower(X, W, V).as_text()


def test_one_custom_call_per_call():
    f = megakernelize(block, implementation="cpu")
    text = jax.jit(lambda x, w, v: f(f(x, w, v), w, v)).lower(X, W, V).compile().as_text()
    assert text.count('custom_call_target="jax_mpk_cpu"') == 2
    assert "dot(" not in text and "exponential" not in text


def test_linear_transpose(mk):
    close(jax.linear_transpose(mk(lambda x: x @ W), X)(jnp.ones((4, 48)))[0], jnp.ones((4, 48)) @ W.T)


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (1, None, 2), (None, None, 0)])
def test_vmap(mk, axes):
    args = [a if d is None else jnp.stack([a, 2 * a, -a], d) for a, d in zip((X, W, V), axes, strict=True)]
    close(jax.vmap(mk(block), axes)(*args), jax.vmap(block, axes)(*args))
    close(jax.jit(jax.vmap(mk(block), axes))(*args), jax.vmap(block, axes)(*args))


def test_vmap_stays_a_megakernel():
    f = megakernelize(block, implementation="xla")
    xs = jnp.stack([X, X])
    names = [e.primitive.name for e in jax.make_jaxpr(jax.vmap(f, (0, None, None)))(xs, W, V).eqns]
    assert names == ["megakernel"]


def test_vmap_with_an_axis_name():
    f = megakernelize(lambda x: x / lax.psum(x, "q"), implementation="xla")
    close(jax.vmap(f, axis_name="q")(jnp.arange(1.0, 4)), jnp.arange(1.0, 4) / 6)
    only_name = megakernelize(lambda x: x + lax.axis_index("q"), implementation="xla")
    close(jax.vmap(only_name, in_axes=None, axis_name="q", axis_size=3)(1.0), jnp.arange(1.0, 4))


def test_control_flow(mk):
    f, step = mk(block), lambda x: block(x, W, V)
    want = step(step(step(X)))
    g = lambda x: f(x, W, V)
    close(jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, c: g(c), x))(X), want)
    close(jax.jit(lambda x: lax.scan(lambda c, _: (g(c), c.sum()), x, None, 3)[0])(X), want)
    close(jax.jit(lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, g(c[1])), (0, x))[1])(X), want)
    both = jax.jit(lambda p, x: lax.cond(p, g, lambda x: x, x))
    close((both(True, X), both(False, X)), (step(X), X))


def test_remat_and_grad_of_scan(mk):
    f = mk(block)

    def loss(f, x):
        return jnp.sum(lax.scan(jax.checkpoint(lambda c, _: (f(c, W, V), None)), x, None, 2)[0])

    close(jax.grad(functools.partial(loss, f))(X), jax.grad(functools.partial(loss, block))(X))


def test_nested(mk):
    inner = mk(lambda x: jnp.tanh(x @ W))
    close(mk(lambda x: inner(x) @ V + inner(x * 2) @ V)(X), jnp.tanh(X @ W) @ V + jnp.tanh(2 * X @ W) @ V)


def test_nested_in_a_jitted_function(mk):
    inner = jax.jit(mk(lambda x: jnp.tanh(x @ W)))
    close(mk(lambda x: inner(x) @ V)(X), jnp.tanh(X @ W) @ V)


def mesh_of(n, reverse=False):
    devices = jax.devices("cpu")[:n]
    return jax.make_mesh((n,), ("i",), devices=devices[::-1] if reverse else devices, axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_shard_map(mk, check_vma, reverse):
    f = jax.shard_map(mk(block), mesh=mesh_of(4, reverse), in_specs=(P("i"), P(), P()), out_specs=P("i"),
                      check_vma=check_vma)  # fmt: skip
    close(jax.jit(f)(X, W, V), block(X, W, V))


@pytest.mark.parametrize("check_vma", [True, False])
def test_collectives_in_shard_map(check_vma):
    """Without an implementation named, collectives run one way or another."""
    f = megakernelize(lambda x, w: (lax.psum(x @ w, "i"), lax.axis_index("i") + x[:1, :1] * 0))
    sharded = jax.shard_map(f, mesh=mesh_of(4), in_specs=(P(None, "i"), P("i")), out_specs=(P(), P(None, "i")),
                            check_vma=check_vma)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jax_mpk.MegakernelWarning)
        out, ranks = jax.jit(sharded)(X, W)
    close(out, X @ W)
    assert ranks.tolist() == [[0, 1, 2, 3]]


def test_check_vma_sees_the_types_of_the_results():
    f = megakernelize(lambda x: x * 2, implementation="xla")
    with pytest.raises(ValueError, match=r"out_specs|varying"):
        jax.shard_map(f, mesh=mesh_of(2), in_specs=P("i"), out_specs=P())(X)


def test_mesh_argument(mk):
    f = mk(lambda x, n: block(x, W, V) * n, mesh=mesh_of(2), in_specs=P("i"), out_specs=P("i"), static_argnums=1)
    close(f(X, 2), 2 * block(X, W, V))
    close(jax.jit(f, static_argnums=1)(X, 3), 3 * block(X, W, V))


def test_sharded_arguments_without_shard_map(mk):
    """XLA gathers what it must; the result is right wherever the operands live."""
    x = jax.device_put(X, NamedSharding(mesh_of(2), P("i")))
    w = jax.device_put(W, NamedSharding(mesh_of(2), P(None, "i")))
    close(jax.jit(mk(block))(x, w, V), block(X, W, V))


def step(cache, x, pos):
    """A cache update in place, and a result that depends on the whole cache."""
    cache = lax.dynamic_update_slice(cache, x[None], (pos, 0))
    return cache, jnp.sum(cache * x, -1)


def test_a_donated_cache_is_updated_in_place():
    f = jax.jit(megakernelize(step, implementation="cpu"), donate_argnums=0)
    cache, x = jnp.zeros((64, 32)), X[0]
    compiled = f.lower(cache, x, 3).compile()
    text = compiled.as_text()
    assert "input_output_alias={ {0}: (0" in text
    assert "output_to_operand_aliasing" in text
    assert not re.search(r"= f32\[64,32\]\S* copy\(", text)
    want = step(cache, x, 3)
    where = cache.unsafe_buffer_pointer()
    got = compiled(cache, x, 3)
    assert got[0].unsafe_buffer_pointer() == where and cache.is_deleted()
    close(got, want)


def test_a_cache_that_is_not_donated_keeps_its_value():
    f = jax.jit(megakernelize(step, implementation="cpu"))
    cache = jnp.zeros((64, 32))
    close(f(cache, X[0], 3), step(cache, X[0], 3))
    assert not cache.any()


def test_a_loop_updates_its_cache_without_copies():
    f = megakernelize(step, implementation="cpu")

    def loop(cache, xs):
        return lax.scan(lambda c, i: f(c, xs[i], i), cache, jnp.arange(len(xs)))

    want = lax.scan(lambda c, i: step(c, X[i], i), jnp.zeros((64, 32)), jnp.arange(4))
    compiled = jax.jit(loop, donate_argnums=0).lower(jnp.zeros((64, 32)), X).compile()
    assert not re.search(r"= f32\[64,32\]\S* copy\(", compiled.as_text())
    close(compiled(jnp.zeros((64, 32)), X), want)


def test_lowers_for_other_platforms():
    f = jax.jit(megakernelize(block, implementation="cpu"))
    with pytest.raises(jax_mpk.UnsupportedError, match="lowered for tpu"):
        f.trace(X, W, V).lower(lowering_platforms=("tpu",))
    g = jax.jit(megakernelize(block))
    with pytest.warns(jax_mpk.MegakernelWarning, match="lowered for tpu"):
        assert "custom_call" not in g.trace(X, W, V).lower(lowering_platforms=("tpu",)).as_text()


def test_export():
    from jax import export

    f = jax.jit(megakernelize(block, implementation="cpu"))
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        export.export(f)(X, W, V).serialize()
    exported = export.export(f, disabled_checks=jax_mpk.DISABLE_EXPORT_CHECKS)(X, W, V)
    close(export.deserialize(exported.serialize()).call(X, W, V), block(X, W, V))


def test_one_export_for_cpu_and_gpu():
    """Both lowering rules in one process, without a GPU; what comes out runs on the platform that is there."""
    from jax import export

    try:
        nvrtc.library()
    except jax_mpk.UnsupportedError:
        pytest.skip("no NVRTC in this environment")
    f = jax.jit(megakernelize(block))
    exported = export.export(f, platforms=("cpu", "cuda"), disabled_checks=jax_mpk.DISABLE_EXPORT_CHECKS)(X, W, V)
    text = exported.mlir_module()
    assert all(f"@jax_mpk_{platform}" in text for platform in ("cpu", "cuda"))
    close(export.deserialize(exported.serialize()).call(X, W, V), block(X, W, V))


def python(code, **env):
    """Runs `code` in a fresh process and returns what it prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_exported_function_runs_in_a_fresh_process(tmp_path):
    from jax import export

    f = jax.jit(megakernelize(lambda x: jnp.tanh(x) * 2, implementation="cpu"))
    (tmp_path / "f").write_bytes(export.export(f, disabled_checks=jax_mpk.DISABLE_EXPORT_CHECKS)(X).serialize())
    np.save(tmp_path / "x.npy", X)
    python(f"""
        import jax, jax_mpk, numpy as np
        f = jax.export.deserialize(bytearray(open({str(tmp_path / "f")!r}, "rb").read()))
        np.save({str(tmp_path / "y.npy")!r}, f.call(np.load({str(tmp_path / "x.npy")!r})))
    """)
    close(np.load(tmp_path / "y.npy"), jnp.tanh(X) * 2)


def test_a_persistent_cache_hit_in_a_fresh_process(tmp_path):
    code = """
        import jax, jax.numpy as jnp, jax_mpk
        hits = []
        jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hit" in name else None)
        f = jax.jit(jax_mpk.megakernelize(lambda x: jnp.tanh(x) @ x, implementation="cpu"))
        y = f(jnp.eye(8))
        print(len(hits) > 0, float(y.sum()))
    """
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
           "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}  # fmt: skip
    first, second = python(code, **env).split(), python(code, **env).split()
    assert second[0] == "True" and first[1] == second[1]


def unsupported(x):
    return x * lax.linalg.cholesky(jnp.eye(4) + x @ x.T)[:, :1]  # the line that messages must name


LINE = unsupported.__code__.co_firstlineno + 1


def test_named_implementations_raise_with_the_users_line():
    with pytest.raises(
        jax_mpk.UnsupportedError, match=rf"(?s)cholesky\(float32\[4,4\]\).*test_primitive.py:{LINE} \(unsupported\)"
    ) as e:
        jax.jit(megakernelize(unsupported, implementation="cpu"))(X)
    assert e.value.primitive == "cholesky" and "float32[4,4]" in e.value.shapes and f":{LINE}" in e.value.where


def test_no_implementation_warns_once_with_the_users_line():
    f = megakernelize(unsupported)
    with pytest.warns(
        jax_mpk.MegakernelWarning, match=rf"(?s)hands.*XLA: cholesky\(float32\[4,4\]\).*py:{LINE} "
    ) as seen:
        close(jax.jit(f)(X), unsupported(X))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(jax.jit(lambda x: f(x) + 1)(X), unsupported(X) + 1)


def test_unsupported_types_name_the_type():
    with pytest.raises(jax_mpk.UnsupportedError, match=r"complex64|c64"):
        megakernelize(lambda x: x * 2, implementation="cpu")(X.astype(jnp.complex64))


def test_a_bug_in_the_compiler_is_loud(monkeypatch):
    from jax_mpk import compiler

    def broken(unit):
        raise jax_mpk.VerifyError("task 3 reads what nobody wrote")

    passes = tuple(compiler.Pass(p.name, p.produces, broken if p.name == "verify" else p.run) for p in compiler.PASSES)
    monkeypatch.setattr(compiler, "PASSES", passes)
    with pytest.raises(jax_mpk.VerifyError, match="nobody wrote"):
        megakernelize(lambda x: x * 1.25, implementation="cpu")(X)
    with pytest.warns(jax_mpk.MegakernelWarning, match="bug in jax_mpk.*VerifyError: task 3"):
        close(megakernelize(lambda x: x * 1.25)(X), X * 1.25)


def test_keys_and_other_extended_types():
    f = megakernelize(lambda key: (key, jax.random.uniform(key, (8,))), implementation="cpu")
    key = jax.random.key(3)
    assert f(key)[0] is key
    np.testing.assert_array_equal(f(key)[1], jax.random.uniform(key, (8,)))


def test_threads_and_seeded_orders_give_the_same_bits():
    want = np.asarray(megakernelize(block, implementation="cpu")(X, W, V))
    for knobs in ({"threads": 1}, {"threads": 3}, {"seed": 1}, {"seed": 2}):
        f = jax.jit(megakernelize(block, implementation="cpu", options=knobs))
        ((name, value),) = knobs.items()
        assert f"{name} = {value} : i64" in f.lower(X, W, V).as_text()
        np.testing.assert_array_equal(f(X, W, V), want)


@pytest.mark.parametrize("knobs", [{"deadline_ms": 200}, {"threads": 1}, {"seed": 1}])
def test_a_stuck_launch_ends_with_an_error(knobs):
    """An event that never fires: the launch ends and says who waits; a lone thread knows at once."""
    f = megakernelize(block, implementation="cpu")
    program = abi.decode(f.lower(X, W, V).program)
    sections = {name: program[name].copy() for name in abi.SECTIONS}
    last = sections["Task"][-1]
    assert last["n_waits"], "the second contraction waits for the first"
    sections["Task"][-1]["want"][0] += 1
    sections["Event"]["threshold"][last["wait"][0]] += 1
    blob = abi.encode(sections, **{k: program.header[k] for k in ("workspace", "workers", "args", "results")})
    attributes = {k: np.int64(v) for k, v in ({"deadline_ms": 60_000} | knobs).items()}
    p = jc.Primitive("stuck")
    p.def_abstract_eval(lambda x, w, v: x)
    mlir.register_lowering(
        p, lambda ctx, *a: backends.ffi_call(ctx, a, "jax_mpk_cpu", blob, attributes), platform="cpu"
    )
    start = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)DEADLINE_EXCEEDED.*event"):
        jax.jit(p.bind)(X, W, V).block_until_ready()
    assert time.monotonic() - start < 40
    close(f(X, W, V), block(X, W, V))
