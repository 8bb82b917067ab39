"""The configuration of a model: what its fields may be, and how a ``config.json`` spells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.common.errors import ConfigError
from models.common.fields import Field, OneOf, plain, read, wrong

_STORED = OneOf("bfloat16", "float16", "float32")
OPTIONS = {
    "quantization_config": Field("quantization_config", OneOf(), None),
    "torch_dtype": Field("torch_dtype", _STORED, None),
    "dtype": Field("dtype", _STORED, None),
}
"""What a ``config.json`` may say beyond its shape and would change any model. Checked and not kept."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the configurations of a family share; it adds its fields and says which they are.

    Frozen and hashable, so it can be a static argument of ``jax.jit``.

    Attributes:
      model_type, architecture: what a ``config.json`` calls the family.
      fields: every field by our name. One without a default is required in a ``config.json``.
      options: fields of a ``config.json`` that would change the numbers, of which one value is supported. Checked, and not
        kept: ``to_hf`` writes ``constants``.

    Raises:
      ConfigError: a field is not what ``fields`` says, or does not fit another one.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    fields: ClassVar[Mapping[str, Field]]
    options: ClassVar[Mapping[str, Field]] = OPTIONS
    constants: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        check_fields(self, self.fields)
        self._check()

    def _check(self) -> None:
        """Raise ``ConfigError`` unless the fields, each of which is right by itself, fit each other."""
        if problems := self.conflicts():
            raise ConfigError("; ".join(problems))

    def conflicts(self) -> list[str]:
        """What is wrong between fields each of which is right."""
        return []

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: object = "config.json") -> Self:
        """From the object in a Hugging Face ``config.json``. Null is the same as absent; other fields are not looked at.

        Args:
          where: the file, for the message.

        Raises:
          ConfigError: lists every field that is missing, not what it should be, or not supported.
        """
        problems: list[str] = []
        read(hf, {"model_type": Field("model_type", OneOf(cls.model_type), None)} | cls.options, problems)
        values = cls._read(hf, problems)
        try:
            if not problems:
                return cls(**cls._derive(values))
        except ConfigError as error:
            problems.append(str(error))
        raise ConfigError(f"{plain(where)}: {'; '.join(problems)}")

    @classmethod
    def _read(cls, hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """The values of the fields in ``hf``; what is wrong is appended to ``problems``, and left out."""
        return read(hf, cls.fields, problems)

    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``values``, in which nothing is wrong, with what a ``config.json`` may leave out."""
        return values

    def to_hf(self) -> dict[str, Any]:
        """The object to write as ``config.json``; the inverse of ``from_hf``."""
        kind = {"architectures": [self.architecture], "model_type": self.model_type}
        return spelt(self, self.fields) | kind | dict(self.constants)


def check_fields(config: Any, fields: Mapping[str, Field], prefix: str = "") -> None:
    """Give every field its proper type, or raise one ``ConfigError`` about those that have none."""
    problems = []
    for name, field in fields.items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, field.kind(value))
        except ValueError:
            problems.append(wrong(name, value, field.kind))
    if problems:
        raise ConfigError(prefix + "; ".join(problems))


def filled(values: Mapping[str, Any], **derived: Any) -> dict[str, Any]:
    """``values`` with ``derived`` in place of those that are None."""
    return dict(values) | {name: value for name, value in derived.items() if values[name] is None}


def spelt(source: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values of ``fields`` in ``source`` by their names in a ``config.json``."""
    return {field.key: getattr(source, name) for name, field in fields.items()}


def uneven(hidden: int, heads: int) -> list[str]:
    """What to say if ``hidden`` features cannot be dealt out evenly to ``heads``: none, or one problem."""
    if hidden % heads == 0:
        return []
    return [f"{hidden} features cannot be dealt out to {heads} heads, expected a multiple of the number of heads"]
