"""Typed descriptions of what a user gives: fields of a JSON object, options of a command, arguments.

A *kind* is called with a value and returns it in its proper type, or raises ``ValueError``; as text it is what would have
been right. ``read`` applies a table of fields to an object and collects all that is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Kind = Callable[[Any], Any]

REQUIRED: Any = object()
"""The default of a field that has none."""


@dataclasses.dataclass(frozen=True)
class Integer:
    """An integer, no boolean and no float, from ``low`` to ``high``."""

    low: int
    high: int
    multiple: int = 1

    def __call__(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError
        if not self.low <= value <= self.high or value % self.multiple:
            raise ValueError
        return int(value)

    def __str__(self) -> str:
        of = f" that is a multiple of {self.multiple}" if self.multiple > 1 else ""
        return f"an integer from {self.low} to {self.high}{of}"


@dataclasses.dataclass(frozen=True)
class Real:
    """A finite number, no boolean, from ``low`` to ``high`` (with ``or_zero``, also 0)."""

    low: float
    high: float
    or_zero: bool = False

    def __call__(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        if not (self.low <= value <= self.high or (self.or_zero and value == 0)):  # false for a NaN
            raise ValueError
        return float(value)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g} (nothing else is supported)"
        return f"{'0, or ' if self.or_zero else ''}a number from {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Flag:
    """A boolean."""

    def __call__(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclasses.dataclass(frozen=True)
class Nullable:
    """A value of one kind, or None."""

    kind: Kind

    def __call__(self, value: Any) -> Any:
        return None if value is None else self.kind(value)

    def __str__(self) -> str:
        return f"null, or {self.kind}"


class OneOf:
    """One of a few constants, which may be none at all: then the field must be absent or null."""

    def __init__(self, *values: Any):
        self.values = values

    def __call__(self, value: Any) -> Any:
        if not any(type(value) is type(other) and value == other for other in self.values):
            raise ValueError
        return value

    def __str__(self) -> str:
        values = " or ".join(map(shown, self.values)) or "null"
        return values if len(self.values) > 1 else f"{values} (nothing else is supported)"


class Several:
    """A list of values of one kind, which becomes a tuple; ``or_one`` also takes a value without a list around it."""

    def __init__(self, kind: Kind, or_one: bool = False):
        self.kind, self.or_one = kind, or_one

    def __call__(self, value: Any) -> tuple:
        if isinstance(value, (list, tuple)):
            return tuple(map(self.kind, value))
        if not self.or_one:
            raise ValueError
        return (self.kind(value),)

    def __str__(self) -> str:
        return f"{f'{self.kind}, or ' if self.or_one else ''}a list of which each is {self.kind}"


class Field(NamedTuple):
    """A field of a JSON object: its name there, what it may be, and what it is where it is absent or null."""

    key: str
    kind: Kind
    default: Any = REQUIRED


def read(source: Mapping[str, Any], fields: Mapping[str, Field], problems: list[str], inside: str = "") -> dict:
    """The values of ``fields`` in ``source``, by our names; what is wrong is appended to ``problems``, and left out.

    Args:
      inside: for the messages, the name of the field of which ``source`` is the value.
    """
    values = {}
    for name, field in fields.items():
        value, key = source.get(field.key), f"'{inside}{field.key}'"
        if value is None and field.default is REQUIRED:
            problems.append(f"{key} is missing, expected {field.kind}")
        elif value is None:
            values[name] = field.default
        else:
            try:
                values[name] = field.kind(value)
            except ValueError:
                problems.append(wrong(key, value, field.kind))
    return values


def wrong(what: str, value: Any, kind: Kind) -> str:
    """What to say of a value that is not of its kind."""
    return f"{what} is {shown(value)}, expected {kind}"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlong = 40


def shown(value: Any) -> str:
    """A value as a message shows it: constants as JSON spells them, and never more than a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return _repr.repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return f"an integer of {value.bit_length()} bits"


def plain(text: Any) -> str:
    """A name from outside as a message shows it: itself, unless it would spoil the line."""
    text = str(text)
    return text if len(text) <= 500 and text.isprintable() else ascii(text if len(text) <= 500 else text[:497] + "...")
