"""Which of XLA and the megakernel is faster for a function on a device: the choice of `implementation=None`.

`xla` and `work` say what either would do, as lists of `Piece`s; `model` says how long that takes, from the `Constants` of
the device (`builtin`, or measured by `calibrate`); `choose` compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax_mpk import backends, trace
from jax_mpk.cuts import Cuts, cut
from jax_mpk.errors import UnsupportedError
from jax_mpk.options import Options
from jax_mpk.predict import apart, calibrate, model, operators, xla
from jax_mpk.predict import choose as _choose
from jax_mpk.predict.choose import Choice

__all__ = ["Choice", "choice", "cost", "faster_apart", "to_xla"]


def choice(jaxpr: Any, platform: str, options: Options, name: str) -> Choice:
    """What is chosen for a jaxpr on a platform of this process. Raises `UnsupportedError` for what is no megakernel."""
    target = backends.get(platform).device(options)
    ask = functools.partial(operators.operators, jaxpr, target, options, name=name)
    return _choose.choose(jaxpr, calibrate.constants(target, options), ask)


def to_xla(jaxpr: Any, platform: str, options: Options, name: str) -> bool:
    """Whether XLA gets the function where nobody named an implementation."""
    if not options.choose or options.stop_after:
        return False
    return choice(jaxpr, platform, options, name).to_xla


def faster_apart(jaxpr: Any, platform: str, options: Options) -> Cuts | None:
    """The function cut around what XLA does much faster, where nobody named an implementation. None where there is no such thing, or
    XLA has the whole function anyway."""
    if not options.choose or options.stop_after or not any(map(apart.watched, trace.flat(jaxpr).jaxpr.eqns)):
        return None
    target = backends.get(platform).device(options)
    constants = calibrate.constants(target, options)
    if _choose.early(jaxpr, constants).to_xla:
        return None

    def slow(eqn: Any, alone: Callable[[], Any]) -> bool:
        if not apart.watched(eqn) or apart.repeats(eqn):
            return apart.watched(eqn)
        one = alone()
        try:
            return apart.slower(one, constants, lambda: operators.operators(one, target, options))
        except UnsupportedError:
            return False  # it is refused for its operands' sake, or goes with what needs it

    found = cut(jaxpr, platform, slow)
    return found if found and found.slow else None


def cost(found: Cuts, platform: str, options: Options) -> float:
    """Microseconds that cuts are predicted to cost in a call: what XLA runs, and the calls beyond that of one megakernel. Of a loop
    or branch that XLA has, one iteration counts."""
    c = calibrate.constants(backends.get(platform).device(options), options)
    theirs = sum(model.xla(xla.pieces(p.jaxpr), c).us - c.xla.start for p in found.pieces if p.kind == "xla")
    return theirs + c.mpk.start * max(0, len(found.kernels) - 1)
