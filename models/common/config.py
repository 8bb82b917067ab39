"""Hyper-parameters that every decoder family has, what each of them may be, and how a ``config.json`` spells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from models.common import limits
from models.common.errors import ConfigError
from models.common.fields import Field, Flag, Integer, Real, Several
from models.common.shape import Shape, filled

FIELDS = {
    "vocab_size": Field("vocab_size", Integer(1, limits.VOCABULARY)),
    "hidden_size": Field("hidden_size", Integer(1, limits.HIDDEN)),
    "intermediate_size": Field("intermediate_size", Integer(1, limits.INTERMEDIATE)),
    "num_layers": Field("num_hidden_layers", Integer(1, limits.LAYERS)),
    "num_heads": Field("num_attention_heads", Integer(1, limits.HEADS)),
    "num_kv_heads": Field("num_key_value_heads", Integer(1, limits.HEADS), None),
    "head_dim": Field("head_dim", Integer(2, limits.HEAD_DIM, multiple=2), None),  # rotation is of pairs
    "norm_eps": Field("rms_norm_eps", Real(1e-12, 1.0), 1e-6),
    "tie_embeddings": Field("tie_word_embeddings", Flag(), False),
    "max_len": Field("max_position_embeddings", Integer(1, limits.CONTEXT)),
    "eos_token_ids": Field("eos_token_id", Several(Integer(0, limits.VOCABULARY - 1), or_one=True), ()),
}
"""The fields of ``DecoderConfig``. A default of None: ``from_hf`` derives it from the others."""

_SHAPE = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Shape):
    """Shape of a decoder with grouped-query attention over a cache, and a gated feed-forward block.

    A family extends the tables where it has more fields, or spells or bounds them in another way.

    Attributes (beside those of ``Shape``):
      shape_fields: those in which a checkpoint must agree with a model that it is loaded as.
      explicit: fields that a ``config.json`` must have, be it as null: other readers take a number where they are absent.

    Raises:
      ConfigError: a field is not what ``fields`` says, or does not fit another one.
    """

    fields: ClassVar[Mapping[str, Field]] = FIELDS
    shape_fields: ClassVar[tuple[str, ...]] = _SHAPE
    explicit: ClassVar[tuple[str, ...]] = ()

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tie_embeddings: bool
    max_len: int
    eos_token_ids: tuple[int, ...] = ()

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly, "
                "expected num_attention_heads to be a multiple of num_key_value_heads"
            )
        outside = [token for token in self.eos_token_ids if token >= self.vocab_size]
        if outside:
            raise ConfigError(
                f"eos_token_id is {outside[0]}, expected less than vocab_size, which is {self.vocab_size}"
            )
        if self.num_parameters > limits.PARAMETERS:
            raise ConfigError(
                f"the shape has {self.num_parameters:,} parameters, expected at most {limits.PARAMETERS:,}"
            )

    @property
    def num_parameters(self) -> int:
        """Number of matrix parameters (norm scales and biases, which are a rounding error, are left out)."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * heads * self.head_dim + self.mlp_parameters
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings

    @property
    def mlp_parameters(self) -> int:
        """Number of matrix parameters of one feed-forward block."""
        return 3 * self.hidden_size * self.intermediate_size

    def window(self, layer: int) -> int | None:
        """How many positions a query of a layer sees, itself and those just before it; None sees all before it."""
        return None

    @classmethod
    def _read(cls, hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        for field in (cls.fields[name] for name in cls.explicit):
            if field.key not in hf:
                problems.append(f"'{field.key}' is missing, expected {field.kind}")
        return super()._read(hf, problems)

    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        hidden, heads = values["hidden_size"], values["num_heads"]
        if values["head_dim"] is None and hidden % heads:
            raise ConfigError(f"'head_dim' is missing, and 'hidden_size' {hidden} is not a multiple of {heads} heads")
        return filled(values, num_kv_heads=heads, head_dim=hidden // heads)

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"eos_token_id": list(self.eos_token_ids) or None}
