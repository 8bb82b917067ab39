"""One case both ways."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_mpk
from jax_mpk import UnsupportedError
from tests.execute import Runner
from tests.fuzz import wide
from tests.fuzz.case import FLOATS, Case
from tests.fuzz.judge import differs

SLOW = 20.0
"""Seconds of processor time after which a compile and run counts as a hang."""


@dataclass(frozen=True)
class Verdict:
    """`kind`: "ok" | "cut" (right, with a part that XLA runs) | "refused" (by JAX) | "error" | "differs" | "slow" | "xla"
    (right by XLA:CPU, wrong by XLA:GPU)."""

    kind: str
    text: str = ""

    @property
    def bad(self) -> bool:
        return self.kind in ("error", "differs", "slow")

    def like(self, other: Verdict) -> bool:
        """Whether `other` is the same failure of a smaller case: the kind, and of an error its type."""
        return self.kind == other.kind and (self.kind != "error" or self.text.split(":")[0] == other.text.split(":")[0])


def _unheard(stage: str) -> None:
    pass


def verdict(
    case: Case, implementation: str = "cpu", arch: str = "", whole: bool = True, stage: Callable[[str], None] = _unheard
) -> Verdict:
    """Runs the case with `jax.jit` and as a megakernel, and compares. `whole` as in `wide.Reference`; `stage` is told what
    comes next: "jit" | "own" | "judge"."""
    f, data = case.function(), case.data()
    stage("jit")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = [np.asarray(x) for x in jax.tree.leaves(jax.jit(f)(*data))]
            closed = jax.make_jaxpr(f)(*data)
    except Exception as e:  # JAX refuses the function: not our business
        return Verdict("refused", f"{type(e).__name__}: {e}")
    stage("own")
    start, good = time.process_time(), "ok"
    try:
        if implementation == "emulator":
            have = _emulated(f, case, data, arch)
        elif implementation == "cpu" and case.transform != "donate":
            have = _direct(f, case, data)
        else:
            have = _jitted(f, case, data, implementation, arch)
    except UnsupportedError:
        good = "cut"
    except Exception as e:
        return Verdict("error", f"{type(e).__name__}: {e}"[:2000])
    if good == "cut":
        try:
            have = _jitted(f, case, data, "cuda" if implementation == "cuda" else "cpu", arch, split=True)
        except Exception as e:
            return Verdict("error", f"cut: {type(e).__name__}: {e}"[:2000])
    took = time.process_time() - start
    stage("judge")
    exact = case.exact() if len(want) == len(case.outputs) else [False] * len(want)
    reference = wide.Reference(f, closed, data, whole)
    for n, (a, b, e) in enumerate(zip(have, want, exact, strict=True)):
        try:
            text = differs(a, b, e, n, reference)
        except wide.NoReference as x:
            return Verdict("refused", f"no reference: {x}")
        if text and implementation == "cuda" and not differs(a, _on_cpu(f, data)[n], e, n, reference):
            return Verdict("xla")
        if text:
            return Verdict("differs", f"output {n}{' (exact)' if e else ''}: {text}")
    return Verdict("slow", f"{took:.0f} s") if took > SLOW else Verdict(good)


def _on_cpu(f: Any, data: list[np.ndarray]) -> list[np.ndarray]:
    """By XLA:CPU: XLA:GPU saturates convolutions of bytes, and has no order for updates of one element."""
    out = jax.jit(f)(*(jax.device_put(x, jax.devices("cpu")[0]) for x in data))
    return [np.asarray(x) for x in jax.tree.leaves(out)]


def _direct(f: Any, case: Case, data: list[np.ndarray]) -> list[np.ndarray]:
    """The program on the executor: poisoned memory, a random number of threads or a random legal order."""
    r = np.random.default_rng(case.seed)
    run = Runner(f, *data)
    if r.random() < 0.5:
        return run(threads=int(r.integers(1, 5)))
    return run(seed=int(r.integers(1 << 30)))


def _emulated(f: Any, case: Case, data: list[np.ndarray], arch: str) -> list[np.ndarray]:
    """The CUDA program on the host: threads in an order of this case, accesses without an order are errors."""

    from jax_mpk import device
    from tests.emulator import Site

    gpu = replace(device.cuda(arch or ("sm_90a", "sm_80")[case.seed % 2]), workers=4)
    run = Runner(f, *data, target=gpu)
    site = Site(run.blob)
    return site.run(run, seed=case.seed)


def _jitted(
    f: Any, case: Case, data: list[np.ndarray], implementation: str, arch: str, split: bool = False
) -> list[np.ndarray]:
    """Inside `jax.jit`, with the first operand donated if the case says so; `split`: cut around what has no rule."""
    options: dict[str, Any] = {"arch": arch} if arch else {}
    options["split"] = split
    wrapped = jax_mpk.megakernelize(f, implementation=implementation, options=options)
    donate = (0,) if case.transform == "donate" else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a donated operand that no result can take
        out = jax.jit(wrapped, donate_argnums=donate)(*(jnp.array(x) for x in data))
    out = [np.asarray(x) for x in jax.tree.leaves(jax.block_until_ready(out))]
    if implementation == "cuda":
        from jax_mpk.backends.cuda import backend as cuda

        cuda.check()
    return out


__all__ = ["FLOATS", "Verdict", "verdict"]
