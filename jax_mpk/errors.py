"""Every exception that users can meet. All derive from `MpkError`."""

from __future__ import annotations


class MpkError(Exception):
    """Base class of the errors of this package."""


class UnsupportedError(MpkError, NotImplementedError):
    """The function uses something that megakernels do not do (yet).

    Attributes: `primitive` (its name), `shapes` (text of the operand types), `where` (the user's `file:line (function)`).
    """

    def __init__(self, primitive: str, reason: str, shapes: str = "", where: str = ""):
        self.primitive, self.reason, self.shapes, self.where = primitive, reason, shapes, where
        at = f"\n  at {where}" if where else ""
        super().__init__(f"{primitive}({shapes}): {reason}{at}")


class VerifyError(MpkError):
    """A compiled program does not verify: a compiler bug. It is never launched. The message names tasks and bytes."""


class ExecutionError(MpkError):
    """A launch ended without finishing: the message names worker, task, event, have and want."""


class MegakernelWarning(UserWarning):
    """A function, or a part of it, runs through XLA instead of a megakernel; the message says why and where."""
