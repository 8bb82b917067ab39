"""The constants of the device that is there: built in, or as `python -m jax_mpk calibrate` measured them.

Measuring is never part of compiling: what is chosen would depend on who else used the machine just then. The command
runs a few functions both ways in loops inside one jit, takes the fastest loops, and keeps by how much the built-in
rates were off. The file is for one kind of device, these versions, and these sources.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import lax

from jax_mpk import backends
from jax_mpk.cache import Disk
from jax_mpk.device import Device
from jax_mpk.fingerprint import package_digest
from jax_mpk.options import Options, current
from jax_mpk.predict import builtin
from jax_mpk.predict.constants import Constants

SUFFIX, BYTES = ".rates", 1 << 20
MOST = 8.0
"""How far a measured rate may be from the built-in one: beyond this, something else was measured."""
SECONDS = 0.15
"""Of a probe, each way."""

_known: dict[Any, Constants] = {}
_lock = threading.Lock()


def constants(target: Device, options: Options) -> Constants:
    """The constants of a device; the same ones for the life of the process, until `calibrate` measures them."""
    kind, path = _kind(target.name), options.cache_path()
    where = (target, kind, path)
    with _lock:
        if where not in _known:
            base = builtin.constants(target, kind)
            factors = _read(path, _key(target, kind))
            _known[where] = base if factors is None else scaled(base, factors)
        return _known[where]


def scaled(base: Constants, factors: dict[str, float]) -> Constants:
    """With the times of rates multiplied by what was measured: by "xla dot float32" or "mpk rows", and "xla start"."""

    def side(prefix: str) -> Any:
        s = getattr(base, prefix)
        rates = dict(s.rates)
        for how in rates:
            f = factors.get(f"{prefix} {how}", 1.0)
            arithmetic = 1.0 if how.startswith(("dot", "contract")) else f  # one row measures the memory
            rates[how] = tuple(r.slower(1.0, f, arithmetic) for r in rates[how])
        return replace(s, start=s.start * factors.get(f"{prefix} start", 1.0), rates=rates)

    return replace(base, xla=side("xla"), mpk=side("mpk"), source="measured by python -m jax_mpk calibrate")


def calibrate(platform: str, options: Options | None = None, seconds: float = SECONDS) -> Constants:
    """Measures the device, keeps the result for this process and on disk, and returns it. Takes a few seconds, most of
    them for compiling. A disk that cannot be written warns, as for programs."""
    options = current(options)
    target, kind = backends.get(platform).device(options), _kind(platform)
    base = builtin.constants(target, kind)
    factors = measure(platform, base, target, options, seconds)
    path, key = options.cache_path(), _key(target, kind)
    if path is not None:
        Disk(path, BYTES, SUFFIX, lambda key, data: _parsed(key, data) is not None).put(key, _written(key, factors))
    with _lock:
        _known[target, kind, path] = found = scaled(base, factors)
    return found


def measure(platform: str, base: Constants, target: Device, options: Options, seconds: float) -> dict[str, float]:
    """By what to multiply the built-in times."""
    from jax_mpk.api import megakernelize
    from jax_mpk.predict import model, xla
    from jax_mpk.predict.operators import operators

    factors: dict[str, float] = {}
    for fn, operands, theirs, ours in probes():
        jaxpr = jax.make_jaxpr(fn)(*operands)
        if theirs:
            took = _fastest(fn, operands, seconds) / model.xla(xla.pieces(jaxpr), base).us
            factors[f"xla {theirs}"] = min(max(took, 1 / MOST), MOST)
        if ours:
            wrapped = megakernelize(fn, implementation=platform, options=options)
            predicted = model.megakernel(operators(jaxpr, target, options), base).us
            factors[f"mpk {ours}"] = min(max(_fastest(wrapped, operands, seconds) / predicted, 1 / MOST), MOST)
    return factors


def probes() -> list[tuple[Callable[..., Any], tuple[Any, ...], str, str]]:
    """Functions whose first operand has the type of their result, and the rate of each side that they are for ("": none).
    Their operands do not fit into caches."""
    r = np.random.default_rng(0)

    def make(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        block = jnp.asarray(
            r.standard_normal(1 << 12, np.float32) / 64, dtype
        )  # of 64 times 64 columns: products stay small
        return jnp.resize(block, shape)

    matmul = lambda x, w: x @ w
    return [
        (matmul, (make(1, 6144), make(6144, 6144)), "dot float32", "contract f32"),
        (matmul, (make(1, 6144, dtype=jnp.bfloat16), make(6144, 6144, dtype=jnp.bfloat16)), "", "contract bf16"),
        (lambda x, y: x * 0.5 + y, (make(1 << 23), make(1 << 23)), "fusion", ""),
        (lambda x: jnp.tanh(x) * 0.5 + jnp.exp(-jnp.abs(x)), (make(1 << 20),), "", "rows"),
    ]


def _fastest(fn: Callable[..., Any], operands: tuple[Any, ...], seconds: float, steps: int = 8) -> float:
    """Microseconds of a call in the fastest of the loops that fit into the time."""
    loop = lambda x, *rest: lax.fori_loop(0, steps, lambda _, x: fn(x, *rest), x)
    run = jax.jit(loop).lower(*operands).compile()
    jax.block_until_ready(run(*operands))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / steps


@functools.cache
def _kind(platform: str) -> str:
    """What the maker of the device calls it, or "" without one."""
    try:
        return str(jax.local_devices(backend=platform)[0].device_kind)
    except RuntimeError:
        return ""


def _key(target: Device, kind: str) -> bytes:
    text = f"{target} {kind} {jax.__version__} {jaxlib.version.__version__} {package_digest()}"
    return hashlib.sha256(text.encode()).digest()


def _written(key: bytes, factors: dict[str, float]) -> bytes:
    return key + json.dumps(factors).encode()


def _read(path: Path | None, key: bytes) -> dict[str, float] | None:
    if path is None:
        return None
    data = Disk(path, BYTES, SUFFIX, lambda key, data: _parsed(key, data) is not None).get(key)
    return None if data is None else _parsed(key, data)


def _parsed(key: bytes, data: bytes) -> dict[str, float] | None:
    """The factors in a file of this key, or None."""
    try:
        found = json.loads(data[len(key) :]) if data.startswith(key) else None
    except ValueError:
        return None
    good = isinstance(found, dict) and all(type(v) is float and 1 / MOST <= v <= MOST for v in found.values())
    return found if good else None
