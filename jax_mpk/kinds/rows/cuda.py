"""Rows on a GPU: the nests, and nothing else."""

from __future__ import annotations

from collections.abc import Collection

from jax_mpk.backends.cuda.struct import HEAD, Struct
from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.kinds.bound import Bound
from jax_mpk.kinds.variant import Variant


def variant(b: Bound, body: Body, device: Device, fixed: Collection[int]) -> Variant:
    return Variant()


def source(s: Struct, v: Variant) -> tuple[str, str]:
    """The call of a task, and its struct."""
    main = s.function("main", "", s.body.nests["MAIN"], {})
    run = f"{HEAD} void run(Worker& w, const Desc& d) {{\n  main(w, d, range(d.index));\n  finish(w, d, true);\n}}"
    return "@::run(w, d)", s.text(s.range(), main, run)
