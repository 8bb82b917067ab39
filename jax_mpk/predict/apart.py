"""Which equations of a function XLA does so much faster that they are worth a cut: `implementation=None` asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax_mpk.control import TOGETHER, stacks
from jax_mpk.frontend.control import equations
from jax_mpk.predict import model, xla
from jax_mpk.predict.constants import Constants
from jax_mpk.predict.piece import Piece

NAMES = ("sort", "top_k", "approx_top_k", "conv_general_dilated", "ragged_dot_general", "select_and_scatter_add")
FAMILIES = ("scatter", "cum", "reduce_window")
"""What may take a megakernel many times as long as XLA, by itself: other equations are as fast, or refused."""
STORES, ELEMENTS = 64, 1 << 13
"""Windows of a scatter, and elements of what is sorted, added up or convolved, up to which an equation cannot be so slow."""
WRITTEN = 5_000
"""Equations up to which a loop is written out, whatever it repeats: that takes some 5 s."""
LAUNCHES = 2
"""Calls of a megakernel that a cut costs, at most: what was one is two, and what is behind waits for all of it."""


def watched(eqn: Any) -> bool:
    """Whether an equation is worth asking about: asking takes milliseconds, and a decoder has many small updates."""
    name = eqn.primitive.name
    if name.startswith("scatter"):
        indices = eqn.invars[1]
        return bool(xla.size(indices) > STORES * max(1, indices.aval.shape[-1]))
    if name in NAMES or name.startswith(FAMILIES):
        return max(map(xla.size, eqn.invars)) > ELEMENTS
    return repeats(eqn)


def repeats(eqn: Any) -> bool:
    """Whether an equation is a loop that is hardly faster if it is written out, and takes long to compile."""
    if eqn.primitive.name != "scan" or eqn.params["length"] < 2 or stacks(eqn):
        return False
    work = equations(eqn.params["jaxpr"])
    return 8 * work > TOGETHER or work * int(eqn.params["length"]) > WRITTEN


def slower(jaxpr: Any, c: Constants, operators: Callable[[], Any]) -> bool:
    """Whether a megakernel of the equation takes so much longer than XLA. `operators()`: its pieces."""
    theirs = model.xla(xla.pieces(jaxpr), c).us - c.xla.start
    pieces: tuple[Piece, ...] = operators()
    ours = model.megakernel(pieces, c).us - c.mpk.start
    return ours - theirs > LAUNCHES * c.mpk.start + c.gain
