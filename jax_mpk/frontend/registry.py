"""The table of primitives: a name to the function that lowers one equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_mpk.frontend.builder import Tensor

Rule = Callable[..., "Tensor | Sequence[Tensor]"]
"""`rule(b: Builder, eqn: Equation, *operands: Tensor)` gives the equation's results (one tensor, or a list)."""

RULES: dict[str, Rule] = {}


def primitive(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the primitives `names`."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def rules(table: dict[str, Any], make: Callable[[Any], Rule]) -> None:
    """Registers `make(entry)` for every name and entry of a table."""
    for name, entry in table.items():
        RULES[name] = make(entry)
