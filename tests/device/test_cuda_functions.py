"""Functions of every kind as megakernels on the GPU, against the CPU executor and `jax.jit`, also as sm_80 code."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk.backends.cuda import backend as cuda
from tests import functions
from tests.fuzz.judge import differs
from tests.fuzz.wide import Reference

pytestmark = pytest.mark.device
ARCHS = pytest.mark.parametrize("arch", ["", "sm_80"], ids=["own", "sm_80"])


def on_gpu(f, args, arch: str) -> list:
    out = jax.jit(jax_mpk.megakernelize(f, implementation="cuda", options={"arch": arch}))(*args)
    jax.block_until_ready(out)
    cuda.check()
    return [np.asarray(x) for x in jax.tree.leaves(out)]


def on_cpu(f, args) -> list:
    """The same function on the CPU executor, in the same process."""
    out = jax.jit(jax_mpk.megakernelize(f, implementation="cpu"))(*jax.device_put(args, jax.devices("cpu")[0]))
    return [np.asarray(x) for x in jax.tree.leaves(out)]


def by_jit(f, args, on: str = "gpu") -> list:
    with jax.default_matmul_precision("highest"):
        out = jax.jit(f)(*jax.device_put(args, jax.devices(on)[0]))
        return [np.asarray(x) for x in jax.tree.leaves(out)]


def close(have: list, want: list, what: str) -> None:
    """Integers are equal; floats up to a few units of the type, in the size of the result."""
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, what
        if a.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b, what)
            continue
        eps = {"float32": 4e-6, "bfloat16": 2.0**-7, "float16": 2.0**-9}[a.dtype.name]
        a, b = a.astype(np.float64), b.astype(np.float64)
        size = np.abs(b[np.isfinite(b)]).max(initial=1e-30)
        np.testing.assert_allclose(a, b, rtol=8 * eps, atol=2 * eps * size, err_msg=what)


@ARCHS
@pytest.mark.parametrize("name", [*functions.CASES, *functions.TASKS])
def test_everything_that_is_lowered(name, arch):
    f, args = (functions.CASES | functions.TASKS)[name]
    got = on_gpu(f, args, arch)
    close(got, on_cpu(f, args), "against the CPU")
    # XLA:CPU, whose updates of one place happen in order too, and which has convolutions and products of all integers.
    # Where it keeps less precision than the types say (a product of two types on a CPU with bf16 units), float64 decides.
    jit, reference = by_jit(f, args, "cpu"), Reference(f, jax.make_jaxpr(f)(*args), args)
    for n, (a, b) in enumerate(zip(got, jit, strict=True)):
        try:
            close([a], [b], "against jit")
        except AssertionError as e:
            assert not differs(a, b, False, n, reference), str(e)


@ARCHS
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", functions.NO_DECODERS)
def test_functions_that_are_no_decoder(name, dtype, rows, arch):
    """Error against float32 at most 1.25 times that of `jax.jit`, and the CPU executor's results."""
    f, args = functions.no_decoder(name, rows, dtype)
    exact = by_jit(f, [a.astype(np.float32) if a.dtype == jnp.bfloat16 else a for a in args])
    got, cpu, jit = on_gpu(f, args, arch), on_cpu(f, args), by_jit(f, args)
    for e, a, b, c in zip(exact, got, jit, cpu, strict=True):
        e = e.astype(np.float64)
        size = np.sqrt(np.mean(e**2))
        ours, theirs = (np.sqrt(np.mean((x.astype(np.float64) - e) ** 2)) for x in (a, b))
        assert ours <= 1.25 * theirs + 1e-5 * size
        apart = np.sqrt(np.mean((a.astype(np.float64) - c.astype(np.float64)) ** 2))
        assert apart <= (1e-2 if dtype == jnp.bfloat16 else 1e-5) * size


def test_one_export_runs_on_both_platforms(tmp_path):
    """Lowered for CPU and GPU in one process; called here on both, and in a fresh process that lowers nothing."""
    from jax import export

    f, args = functions.no_decoder("mlp", 3, jnp.float32)
    both = export.export(
        jax.jit(jax_mpk.megakernelize(f)), platforms=("cpu", "cuda"), disabled_checks=jax_mpk.DISABLE_EXPORT_CHECKS
    )(*args)
    (tmp_path / "f").write_bytes(both.serialize())
    want = by_jit(f, args)
    for platform in ("cpu", "cuda"):
        held = jax.device_put(args, jax.devices(platform)[0])
        close([np.asarray(jax.jit(both.call)(*held))], want, platform)
    np.savez(tmp_path / "args.npz", *args)
    code = f"""
        import jax, jax_mpk, numpy as np
        f = jax.export.deserialize(bytearray(open({str(tmp_path / "f")!r}, "rb").read()))
        args = list(np.load({str(tmp_path / "args.npz")!r}).values())
        assert "@jax_mpk_cuda" in f.mlir_module() and jax.devices()[0].platform == "gpu"
        np.save({str(tmp_path / "y.npy")!r}, jax.jit(f.call)(*args))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
    close([np.load(tmp_path / "y.npy")], want, "in a fresh process")
