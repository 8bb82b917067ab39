"""Whether a function goes to XLA or becomes a megakernel, and why: `choose`, what `implementation=None` asks.

The answer depends on the function, the device, the knobs and the constants, and on nothing else: no clock is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax_mpk import _compat
from jax_mpk.predict import model, xla
from jax_mpk.predict.constants import Constants
from jax_mpk.predict.model import Time
from jax_mpk.predict.piece import Piece

CONTRACTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "uint8": "i8"}


@dataclass(frozen=True)
class Choice:
    """What was predicted, in microseconds. bound: `megakernel` is less than it would take; more was not needed (and the
    function not compiled) to know. details: what the times are made of, in words."""

    xla: Time
    megakernel: Time
    bound: bool
    constants: Constants
    details: tuple[str, str]

    @property
    def to_xla(self) -> bool:
        """Whether XLA gets the function. A megakernel must win by the margin, and by the gain."""
        xla, ours = self.xla.us, self.megakernel.us
        return ours * self.constants.margin >= xla or ours + self.constants.gain >= xla

    def document(self) -> dict[str, Any]:
        """For a file: microseconds, what was chosen, and everything in words."""
        return {
            "xla": self.xla.us,
            "megakernel": self.megakernel.us,
            "bound": self.bound,
            "to_xla": self.to_xla,
            "text": str(self),
        }

    def __str__(self) -> str:
        c, winner = self.constants, "XLA" if self.to_xla else "a megakernel"
        least = "at least " if self.bound else ""
        lines = [
            f"implementation=None: {winner} (a megakernel must be predicted {c.margin:.2f} times as fast, by {c.gain:.0f} us)"
        ]
        for name, t, details, how in (
            ("XLA", self.xla, self.details[0], ""),
            ("megakernel", self.megakernel, self.details[1], least),
        ):
            parts = ", ".join(f"{k} {v:.1f}" for k, v in (("launches", t.launch), ("bytes", t.bytes), ("work", t.work),
                                                         ("fused scalar work", t.scalar)) if v >= 0.05)  # fmt: skip
            lines.append(f"  {name}: {how}{t.us:,.1f} us ({parts or 'nothing'}; {details})")
        lines.append(f"  constants: {c.name}, {c.source}; a call {c.xla.start:.3g} and {c.mpk.start:.3g} us, a hop {c.hop:.3g} us "
                     "(python -m jax_mpk constants)")  # fmt: skip
        return "\n".join(lines)


def choose(jaxpr: Any, constants: Constants, operators: Callable[[], Sequence[Piece]]) -> Choice:
    """Decides. `operators()` are the pieces of the megakernel, which cost a part of its compilation: they are asked for
    only where what is known from the jaxpr leaves it open. Raises what `operators` raises."""
    first = early(jaxpr, constants)
    if first.to_xla:
        return first
    ops = operators()
    ours = model.megakernel(ops, constants)
    hops = 1 + max((p.level for p in ops), default=0)
    each = (
        (p.how, model.operator(p, constants, constants.workers, tasks=n), 1) for p, n in zip(ops, model.beside(ops))
    )
    made = _describe(each, "operator")
    details = first.details[0], f"{hops} hop{'s' if hops > 1 else ''}, {made}"
    return Choice(first.xla, ours, False, constants, details)


def early(jaxpr: Any, constants: Constants) -> Choice:
    """What the jaxpr alone says: a choice for XLA is final."""
    kernels = xla.pieces(jaxpr)
    about = _describe(((p.how, model.kernel(p, constants), p.count) for p in kernels), "kernel")
    least = floor(jaxpr, kernels, constants)
    return Choice(model.xla(kernels, constants), least, True, constants, (about, "a lower bound from the jaxpr"))


def floor(jaxpr: Any, kernels: Sequence[Piece], c: Constants) -> Time:
    """What a megakernel takes at least: its call, its operands and results once, its contractions, and half of the
    scalar work that the jaxpr shows (fusing removes some)."""
    work = scalar = 0.0
    contracts = any(p.work for p in kernels)
    for p in kernels:
        if p.work:
            names = ["attention", *(k for k in c.mpk.rates if k.startswith("contract"))]
            if p.how.startswith("dot "):
                names = [f"contract {CONTRACTS.get(p.how.removeprefix('dot '), '')}"]
            if p.how not in ("conv", "grouped"):
                work += min(c.mpk.work(n, p.rows, p.work) for n in names) * p.count
        elif p.how in ("fusion", "fused", "reduce", "reduce outer"):
            scalar += p.scalar * p.count / 2
    rate = max(c.scalar if contracts else 0.0, c.mpk.rate("rows").work)
    return Time(
        c.mpk.start,
        _operands(jaxpr) / max(max(r.bandwidth, r.near) for v in c.mpk.rates.values() for r in v),
        work,
        scalar / rate,
    )


def _operands(jaxpr: Any) -> int:
    """Bytes of the results, and of the operands that are read whole, as far as it shows."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inner = (*_compat.CALLS, *xla.CONTROL)
    whole: set[Any] = set()
    partial: set[Any] = set()
    results, nbytes = set(jaxpr.outvars), 0
    for e in jaxpr.eqns:
        name = e.primitive.name
        window = name.startswith(("scatter", "dynamic"))
        operands = {v for v in e.invars if not hasattr(v, "val")}
        (partial if window or name in xla.PARTIAL or name in inner else whole).update(operands)
        if not window and name not in inner:
            nbytes += sum(xla.nbytes(v) for v in e.outvars if v in results)
    return nbytes + sum(xla.nbytes(v) for v in jaxpr.invars if v in whole and v not in partial)


def _describe(parts: Iterable[tuple[str, Time, int]], noun: str) -> str:
    """How many pieces, and the kinds that take the most."""
    us: dict[str, float] = {}
    number = 0
    for how, t, count in parts:
        us[how] = us.get(how, 0.0) + t.us
        number += count if how not in ("fused", "loop") else 0
    top = ", ".join(f"{how} {t:.1f}" for how, t in sorted(us.items(), key=lambda x: -x[1])[:3])
    return f"{number} {noun}{'' if number == 1 else 's'}{': ' + top if top else ''}"
