"""The configuration of a model that is no plain decoder: what its fields may be, and how a ``config.json`` spells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.common.errors import ConfigError
from models.common.fields import Field, OneOf, plain, read, wrong

_STORED = OneOf("bfloat16", "float16", "float32")
COMMON = {
    "quantization_config": Field("quantization_config", OneOf(), None),
    "torch_dtype": Field("torch_dtype", _STORED, None),
    "dtype": Field("dtype", _STORED, None),
}
"""What any ``config.json`` may say beyond a shape and would change the model. Checked and not kept."""


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
    options: ClassVar[Mapping[str, Field]] = {}
    constants: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        problems = []
        for name, field in self.fields.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, field.kind(value))
            except ValueError:
                problems.append(wrong(name, value, field.kind))
        problems = problems or self.conflicts()
        if problems:
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
        read(hf, {"model_type": Field("model_type", OneOf(cls.model_type), None), **COMMON, **cls.options}, problems)
        values = read(hf, cls.fields, problems)
        try:
            if not problems:
                return cls(**values)
        except ConfigError as error:
            problems.append(str(error))
        raise ConfigError(f"{plain(where)}: {'; '.join(problems)}")

    def to_hf(self) -> dict[str, Any]:
        """The object to write as ``config.json``; the inverse of ``from_hf``."""
        fields = {field.key: getattr(self, name) for name, field in self.fields.items()}
        return fields | {"architectures": [self.architecture], "model_type": self.model_type, **self.constants}


def uneven(hidden: int, heads: int) -> list[str]:
    """What to say if ``hidden`` features cannot be dealt out evenly to ``heads``: none, or one problem."""
    if hidden % heads == 0:
        return []
    return [f"{hidden} features cannot be dealt out to {heads} heads, expected a multiple of the number of heads"]
