"""The custom call `jax_mpk_cpu` under XLA: jit, donation, loops, errors as exceptions, shard_map on eight devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_mpk import _ext, abi
from jax_mpk.backends.cpu import backend as cpu
from tests.unit import executor_builder as eb
from tests.unit.executor_builder import Builder, V, elementwise, instr

N = 1000


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    cpu.ready()


def call(
    blob: bytes, *results: jax.ShapeDtypeStruct, alias: dict[int, int] | None = None, **attributes: Any
) -> Callable[..., Any]:
    """The custom call of a program, as the lowering emits it."""
    workspace = int(np.frombuffer(blob, abi.RECORDS["Header"], 1)[0]["workspace"])
    types = [*results]
    if workspace:
        types.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    run = jax.ffi.ffi_call(cpu.TARGET_NAME, types, input_output_aliases=alias)
    attrs = dict(program=np.frombuffer(blob, np.uint8), deadline_ms=np.int64(60000))
    return lambda *xs: run(*xs, **attrs | attributes)[: len(results)]


def chain(skip: bool = False, alias: int = -1) -> bytes:
    """y = -(x + 1) through the workspace, in tasks of two workers."""
    b = Builder()
    x = b.arg(4 * N)
    t, y = b.temp(4 * N), b.result(4 * N, alias=alias)
    one = elementwise(b, "one", x, t, N, 100, [instr("CONST", V + 1, imm=1.0), instr("F_ADD", V + 2, V, V + 1)], V + 2)
    neg = elementwise(b, "neg", t, y, N, 250, [instr("F_NEG", V + 1, V)], V + 1)
    e = b.event(b.grids[one])
    b.tasks(one, (), () if skip else (e,))
    b.tasks(neg, (e,))
    return b.blob()


def scaled(by: float) -> bytes:
    """y = by * x."""
    b = Builder()
    body = [instr("CONST", V + 1, imm=by), instr("F_MUL", V + 2, V, V + 1)]
    b.tasks(elementwise(b, "scaled", b.arg(4 * N), b.result(4 * N), N, 250, body, V + 2))
    return b.blob()


F32 = jax.ShapeDtypeStruct((N,), jnp.float32)


def test_jit() -> None:
    f = jax.jit(lambda x: call(chain(), F32)(x * 2)[0] * 3)
    x = jnp.arange(N, dtype=jnp.float32)
    np.testing.assert_array_equal(f(x), -(2 * x + 1) * 3)


def test_a_loop() -> None:
    f = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, y: call(chain(), F32)(y)[0], x))
    x = jnp.arange(N, dtype=jnp.float32)
    np.testing.assert_array_equal(f(x), x)


def test_a_donated_operand_is_updated_in_place() -> None:
    b = Builder()
    x = b.arg(4 * N)
    y = b.result(4 * N, alias=0)
    b.tasks(elementwise(b, "half", x, y, N // 2, 100, [instr("F_NEG", V + 1, V)], V + 1))
    blob = b.blob()
    want = np.concatenate([-np.arange(N // 2), np.arange(N // 2, N)]).astype(np.float32)
    one = call(blob, F32, alias={0: 0})
    x = jnp.arange(N, dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(one)(x)[0], want)
    np.testing.assert_array_equal(x, np.arange(N))  # not donated: XLA copies first
    where = x.unsafe_buffer_pointer()
    out = jax.jit(one, donate_argnums=0)(x)[0]
    np.testing.assert_array_equal(out, want)
    assert out.unsafe_buffer_pointer() == where
    # A caller that declares no alias: the executor itself starts from the operand.
    np.testing.assert_array_equal(jax.jit(call(blob, F32))(jnp.arange(N, dtype=jnp.float32))[0], want)


def test_bfloat16_operands() -> None:
    m, n, k = 2, 96, 40
    b = Builder()
    slots = b.arg(4 * m * k), b.arg(2 * k * n, "BF16"), b.result(4 * m * n)
    b.tasks(eb.matmul(b, "matmul", *slots, m, n, k, tile=(2, 32), wtype="BF16"))
    x = jax.random.normal(jax.random.key(0), (m, k))
    w = jax.random.normal(jax.random.key(1), (k, n)).astype(jnp.bfloat16)
    (y,) = jax.jit(call(b.blob(), jax.ShapeDtypeStruct((m, n), jnp.float32)))(x, w)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64), atol=1e-4)


def test_errors_are_exceptions_and_the_next_launch_works() -> None:
    x = jnp.ones(N)
    bad = jax.jit(call(chain(skip=True), F32, deadline_ms=np.int64(100)))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"DEADLINE_EXCEEDED.*task \d+ \(neg\[0\]\) waits for event 0: have 0, want 10"
    ):
        jax.block_until_ready(bad(x))
    np.testing.assert_array_equal(jax.jit(call(chain(), F32))(x)[0], -2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="operand 0 has 40 bytes, not 4000"):
        jax.block_until_ready(jax.jit(call(chain(), F32))(jnp.ones(10)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not match its hash"):
        broken = bytearray(chain())
        broken[-100] ^= 1
        attrs = dict(program=np.frombuffer(bytes(broken), np.uint8), deadline_ms=np.int64(1000))
        jax.block_until_ready(jax.jit(call(chain(), F32, **attrs))(x))


def test_a_program_is_not_taken_for_another_of_its_size() -> None:
    """`other` runs; then a program of as many bytes and operands that claims to be it, and one whose key alone differs."""
    x = jnp.arange(N, dtype=jnp.float32)
    other = scaled(2.0)
    np.testing.assert_array_equal(jax.jit(call(other, F32))(x)[0], 2 * x)
    at = abi.RECORDS["Header"].fields["hash"][1]
    good = scaled(3.0)
    forged = good[:at] + other[at : at + 32] + good[at + 32 :]
    assert len(forged) == len(other)
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not match its hash"):
        jax.block_until_ready(jax.jit(call(forged, F32))(x))
    with pytest.raises(_ext.ProgramError, match="does not match its hash"):
        _ext.run(forged, [np.asarray(x)], [np.zeros(N, np.float32)])
    np.testing.assert_array_equal(jax.jit(call(good, F32))(x)[0], 3 * x)
    np.testing.assert_array_equal(jax.jit(call(other, F32))(x)[0], 2 * x)
    before = _ext.programs_kept()
    p = abi.decode(good)
    np.testing.assert_array_equal(jax.jit(call(abi.encode(p.sections, key=b"k" * 32, **p.settings), F32))(x)[0], 3 * x)
    assert _ext.programs_kept() == min(before + 1, 256)


def test_the_table_of_programs_is_bounded() -> None:
    x, y = np.ones(N, np.float32), np.zeros(N, np.float32)
    for n in range(260):
        _ext.run(scaled(float(n)), [x], [y], threads=1)
        assert y[0] == n
    assert _ext.programs_kept() == 256
    _ext.run(scaled(0.0), [x], [y], threads=1)
    assert y[0] == 0


@functools.cache
def mesh() -> jax.sharding.Mesh:
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("d",))


def test_eight_devices_at_once() -> None:
    """Launches of the devices meet at one pool; psums between them keep XLA's threads waiting for each other."""
    one = call(chain(), F32)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh(), in_specs=P("d"), out_specs=P(), check_vma=False)
    def f(x: jax.Array) -> jax.Array:
        y = one(x.reshape(-1))[0]
        for _ in range(3):
            y = one(jax.lax.psum(y, "d") / 8)[0]
        return y

    x = np.arange(8 * N, dtype=np.float32).reshape(8, N)
    sharded = jax.device_put(x, NamedSharding(mesh(), P("d")))
    want = x.mean(0)
    for _ in range(20):
        np.testing.assert_allclose(f(sharded), want, rtol=1e-6)
