"""Configurations of decoders with rotary positions: the base and the scaling, and the two ways to spell them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from models.common import limits
from models.common.config import FIELDS, DecoderConfig
from models.common.errors import ConfigError
from models.common.fields import Field, Integer, OneOf, Real, Several, plain, read, shown
from models.common.shape import OPTIONS, check_fields, filled, spelt

SCALING = {
    "factor": Field("factor", Real(1.0, 1e6)),
    "low_freq_factor": Field("low_freq_factor", Real(1e-3, 1e6)),
    "high_freq_factor": Field("high_freq_factor", Real(1e-3, 1e6)),
    "original_max_len": Field("original_max_position_embeddings", Integer(1, limits.CONTEXT)),
}
"""The fields of ``Llama3RopeScaling``."""

ROTARY_FIELDS = FIELDS | {"rope_theta": Field("rope_theta", Real(1.0, 1e12), None)}
"""The fields of ``RotaryConfig`` that are numbers."""

ROTARY_OPTIONS = OPTIONS | {
    "hidden_act": Field("hidden_act", OneOf("silu"), None),
    "attention_bias": Field("attention_bias", OneOf(False), None),
    "mlp_bias": Field("mlp_bias", OneOf(False), None),
    "use_sliding_window": Field("use_sliding_window", OneOf(False), None),
    "layer_types": Field("layer_types", Several(OneOf("full_attention")), None),
    "partial_rotary_factor": Field("partial_rotary_factor", Real(1.0, 1.0), None),
}
"""What a ``config.json`` of such a decoder may say, unless its family takes it in another way."""

_ROPE_TYPE = OneOf("default", "llama3")
_ROPE = {
    "rope_theta": ROTARY_FIELDS["rope_theta"],
    "rope_type": Field("rope_type", _ROPE_TYPE, None),
    "type": Field("type", _ROPE_TYPE, None),  # older
}


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """How Llama 3 stretches the slow rotary frequencies to contexts longer than it was pretrained on.

    Wavelengths below ``original_max_len / high_freq_factor`` are kept, those above
    ``original_max_len / low_freq_factor`` are stretched by ``factor``, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int

    def __post_init__(self) -> None:
        check_fields(self, SCALING, "rope scaling: ")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor is {self.low_freq_factor:g}, expected less than high_freq_factor, which is "
                f"{self.high_freq_factor:g}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig(DecoderConfig):
    """Shape of a pre-norm decoder with rotary positions and, unless the family says else, a SwiGLU feed-forward block.

    Attributes:
      default_theta: the base where a ``config.json`` has none.
    """

    fields = ROTARY_FIELDS
    options = ROTARY_OPTIONS
    constants = {"hidden_act": "silu", "attention_bias": False}
    default_theta: ClassVar[float]

    rope_theta: float
    rope_scaling: Llama3RopeScaling | None = None

    def _check(self) -> None:
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Llama3RopeScaling):
            raise ConfigError(f"rope_scaling is {shown(self.rope_scaling)}, expected a Llama3RopeScaling or None")
        super()._check()

    @classmethod
    def _read(cls, hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        values = super()._read(hf, problems)
        return values | read_rope(cls._rope_parts(hf), values.get("rope_theta"), problems)

    @classmethod
    def _rope_parts(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The objects of a ``config.json`` that describe the rotation, by the names of their places."""
        return {key: hf.get(key) for key in ("rope_parameters", "rope_scaling")}

    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        return filled(super()._derive(values), rope_theta=cls.default_theta)

    def to_hf(self) -> dict[str, Any]:
        scaling = self.rope_scaling
        return super().to_hf() | {"rope_scaling": scaling and {"rope_type": "llama3"} | spelt(scaling, SCALING)}


def read_rope(parts: Mapping[str, Any], theta: float | None, problems: list[str]) -> dict[str, Any]:
    """Rotary base and scaling.

    Args:
      parts: the objects that describe them, by the names of their places, or None: in the newer spelling
        ``rope_parameters``, in the older one ``rope_scaling``, and where there are several, all alike.
      theta: the base, if it stands outside of them.
    """
    thetas, scalings = [theta], []
    for key, part in parts.items():
        if part is not None and not isinstance(part, Mapping):
            problems.append(f"'{key}' is {shown(part)}, expected an object or null")
        elif part is not None:
            values = read(part, _ROPE, problems, f"{key}.")
            thetas.append(values.get("rope_theta"))
            scalings.append(_read_scaling(part, values, f"{key}.", problems))
    thetas = [value for value in thetas if value is not None]
    if len(set(thetas)) > 1:
        problems.append(f"'rope_theta' is {thetas[0]:g} in one place and {thetas[1]:g} in another, expected one value")
    if len(set(scalings)) > 1 and not problems:
        problems.append(f"{' and '.join(map(repr, parts))} differ, expected one of them")
    return {"rope_theta": thetas[0] if thetas else None, "rope_scaling": scalings[0] if scalings else None}


def _read_scaling(
    part: Mapping[str, Any], values: Mapping[str, Any], inside: str, problems: list[str]
) -> Llama3RopeScaling | None:
    """The scaling that ``part`` of a ``config.json`` describes; every field of it must be one that has been understood."""
    if not {"rope_type", "type"} <= values.keys():
        return None  # and ``problems`` says why
    kinds = {values["rope_type"], values["type"]} - {None}
    fields = SCALING if kinds == {"llama3"} else {}
    known = {field.key for field in (*_ROPE.values(), *fields.values())}
    strange = [name for name, value in part.items() if value is not None and name not in known]
    if len(kinds) > 1:
        problems.append(f"'{inside}rope_type' and '{inside}type' differ, expected one of them")
    elif strange and not kinds:
        problems.append(f"'{inside}rope_type' is missing, expected {_ROPE_TYPE}")
    elif strange:
        problems.append(f"'{inside}{plain(strange[0])}' is not supported with rope_type {shown(*kinds)}")
    before = len(problems)
    numbers = read(part, fields, problems, inside)
    if not fields or len(problems) > before:
        return None
    try:
        return Llama3RopeScaling(**numbers)
    except ConfigError as error:
        problems.append(f"'{inside[:-1]}': {error}")
        return None
