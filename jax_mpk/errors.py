"""Every exception that users can meet. All derive from `MpkError`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace


class MpkError(Exception):
    """Base class of the errors of this package."""


class OptionError(MpkError, ValueError):
    """A knob has a value that it cannot have. It is always raised, also where an unsupported function would run through
    XLA: the message names the knob."""


class StateError(MpkError, ValueError):
    """A `flax.nnx` Variable is updated where the update would be lost; the message names its path."""


@dataclass(frozen=True)
class Gap:
    """One thing that megakernels do not do: the primitive (or what stands for it), the types of its operands as text, the
    reason, and the user's `file:line (function)`."""

    primitive: str
    reason: str
    shapes: str = ""
    where: str = ""

    def __str__(self) -> str:
        at = f"\n  at {self.where}" if self.where else ""
        return f"{self.primitive}({self.shapes}): {self.reason}{at}"


class UnsupportedError(MpkError, NotImplementedError):
    """The function uses something that megakernels do not do (yet).

    Attributes: `gaps`, all that was found (`Gap`s, the first one first); `primitive`, `reason`, `shapes` and `where` of
    the first one.
    """

    LISTED = 8
    """Gaps that the message has; the others are counted."""

    def __init__(self, primitive: str, reason: str, shapes: str = "", where: str = ""):
        self._fill((Gap(primitive, reason, shapes, where),))

    @classmethod
    def of(cls, gaps: Iterable[Gap]) -> UnsupportedError:
        """One error for everything in `gaps`, of which there is at least one."""
        error = cls.__new__(cls)
        error._fill(tuple(gaps))
        return error

    def _fill(self, gaps: tuple[Gap, ...]) -> None:
        self.gaps = gaps
        self.primitive, self.reason, self.shapes, self.where = (
            gaps[0].primitive, gaps[0].reason, gaps[0].shapes, gaps[0].where
        )  # fmt: skip
        text = "\nand ".join(map(str, gaps[: self.LISTED]))
        more = len(gaps) - self.LISTED
        super().__init__(text + (f"\nand {more} more" if more > 0 else ""))

    def located(self, at: Callable[[str], str]) -> UnsupportedError:
        """The same error with other lines: `at` of each."""
        return UnsupportedError.of(replace(g, where=at(g.where)) for g in self.gaps)

    def __reduce__(self) -> tuple[object, ...]:
        return UnsupportedError.of, (self.gaps,)


class VerifyError(MpkError):
    """A compiled program does not verify: a compiler bug. It is never launched. The message names tasks and bytes."""


class ExecutionError(MpkError):
    """A launch ended without finishing: the message names worker, task, event, have and want."""


class MegakernelWarning(UserWarning):
    """A function, or a part of it, runs through XLA instead of a megakernel; the message says why and where."""


def plural(n: int, what: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
