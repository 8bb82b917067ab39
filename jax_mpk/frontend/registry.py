"""The table of primitives: a name to the function that lowers one equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_mpk.frontend.builder import Tensor

Rule = Callable[..., "Tensor | Sequence[Tensor]"]
"""`rule(b: Builder, eqn: Equation, *operands: Tensor)` gives the equation's results (one tensor, or a list)."""

RULES: dict[str, Rule] = {}
MOVES: set[str] = set()
"""Primitives that move or choose whole elements: on PRNG keys, whose elements are two words, they act on each word."""


EMPTY: set[str] = set()
"""Primitives with a result even where an operand has no elements; their rules know what it is."""


def primitive(*names: str, moves: bool = False, empty: bool = False) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the primitives `names` (`moves`, `empty`: see `MOVES`, `EMPTY`)."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        if moves:
            MOVES.update(names)
        if empty:
            EMPTY.update(names)
        return rule

    return register


def rules(table: dict[str, Any], make: Callable[[Any], Rule], *, empty: bool = False) -> None:
    """Registers `make(entry)` for every name and entry of a table."""
    for name, entry in table.items():
        primitive(name, empty=empty)(make(entry))
