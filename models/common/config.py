"""Hyper-parameters that every decoder family has, what each of them may be, and how a ``config.json`` spells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.common import limits
from models.common.errors import ConfigError
from models.common.fields import Field, Flag, Integer, OneOf, Real, Several, plain, read, shown, wrong

SCALING = {
    "factor": Field("factor", Real(1.0, 1e6)),
    "low_freq_factor": Field("low_freq_factor", Real(1e-3, 1e6)),
    "high_freq_factor": Field("high_freq_factor", Real(1e-3, 1e6)),
    "original_max_len": Field("original_max_position_embeddings", Integer(1, limits.CONTEXT)),
}
"""The fields of ``Llama3RopeScaling``."""

FIELDS = {
    "vocab_size": Field("vocab_size", Integer(1, limits.VOCABULARY)),
    "hidden_size": Field("hidden_size", Integer(1, limits.HIDDEN)),
    "intermediate_size": Field("intermediate_size", Integer(1, limits.INTERMEDIATE)),
    "num_layers": Field("num_hidden_layers", Integer(1, limits.LAYERS)),
    "num_heads": Field("num_attention_heads", Integer(1, limits.HEADS)),
    "num_kv_heads": Field("num_key_value_heads", Integer(1, limits.HEADS), None),
    "head_dim": Field("head_dim", Integer(2, limits.HEAD_DIM, multiple=2), None),  # rotation is of pairs
    "rope_theta": Field("rope_theta", Real(1.0, 1e12), None),
    "norm_eps": Field("rms_norm_eps", Real(1e-12, 1.0), 1e-6),
    "tie_embeddings": Field("tie_word_embeddings", Flag(), False),
    "max_len": Field("max_position_embeddings", Integer(1, limits.CONTEXT)),
    "eos_token_ids": Field("eos_token_id", Several(Integer(0, limits.VOCABULARY - 1), or_one=True), ()),
}
"""The fields of ``DecoderConfig`` that are numbers. A default of None: ``from_hf`` derives it from the others."""

_STORED = OneOf("bfloat16", "float16", "float32")
OPTIONS = {
    "hidden_act": Field("hidden_act", OneOf("silu"), None),
    "attention_bias": Field("attention_bias", OneOf(False), None),
    "mlp_bias": Field("mlp_bias", OneOf(False), None),
    "use_sliding_window": Field("use_sliding_window", OneOf(False), None),
    "layer_types": Field("layer_types", Several(OneOf("full_attention")), None),
    "partial_rotary_factor": Field("partial_rotary_factor", Real(1.0, 1.0), None),
    "quantization_config": Field("quantization_config", OneOf(), None),
    "torch_dtype": Field("torch_dtype", _STORED, None),
    "dtype": Field("dtype", _STORED, None),
}
"""What a ``config.json`` may say beyond its shape and would change the model. Checked and not kept."""

_ROPE_TYPE = OneOf("default", "llama3")
_ROPE = {
    "rope_theta": FIELDS["rope_theta"],
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
        _check_fields(self, SCALING, "rope scaling: ")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor is {self.low_freq_factor:g}, expected less than high_freq_factor, which is "
                f"{self.high_freq_factor:g}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a pre-norm decoder with grouped-query attention, rotary positions and a SwiGLU feed-forward block.

    Frozen and hashable, so it can be a static argument of ``jax.jit``. A family says what it is called in a ``config.json``.

    Raises:
      ConfigError: a field is not what ``FIELDS`` says, or does not fit another one.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    default_theta: ClassVar[float]

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_len: int
    rope_scaling: Llama3RopeScaling | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_fields(self, FIELDS)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Llama3RopeScaling):
            raise ConfigError(f"rope_scaling is {shown(self.rope_scaling)}, expected a Llama3RopeScaling or None")
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
        """Number of matrix parameters (norm scales, which are a rounding error, are left out)."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings

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
        read(hf, {"model_type": Field("model_type", OneOf(cls.model_type), None)} | OPTIONS, problems)
        values = read(hf, FIELDS, problems)
        values |= _read_rope(hf, values.get("rope_theta"), problems)
        try:
            if not problems:
                return cls(**_derive(values, cls.default_theta))
        except ConfigError as error:
            problems.append(str(error))
        raise ConfigError(f"{plain(where)}: {'; '.join(problems)}")

    def to_hf(self) -> dict[str, Any]:
        """The object to write as ``config.json``; the inverse of ``from_hf``."""

        def spelt(source: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
            return {field.key: getattr(source, name) for name, field in fields.items()}

        scaling = self.rope_scaling
        return spelt(self, FIELDS) | {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": scaling and {"rope_type": "llama3"} | spelt(scaling, SCALING),
            "eos_token_id": list(self.eos_token_ids) or None,
        }


def _check_fields(config: Any, fields: Mapping[str, Field], prefix: str = "") -> None:
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


def _derive(values: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """``values`` with what a ``config.json`` may leave out."""
    hidden, heads = values["hidden_size"], values["num_heads"]
    if values["head_dim"] is None and hidden % heads:
        raise ConfigError(f"'head_dim' is missing, and 'hidden_size' {hidden} is not a multiple of {heads} heads")
    derived = {"num_kv_heads": heads, "head_dim": hidden // heads, "rope_theta": default_theta}
    return values | {name: value for name, value in derived.items() if values[name] is None}


def _read_rope(hf: Mapping[str, Any], theta: float | None, problems: list[str]) -> dict[str, Any]:
    """Rotary base and scaling, in the older spelling ``rope_scaling`` or the newer ``rope_parameters``, or both alike."""
    thetas, scalings = [theta], []
    for key in ("rope_parameters", "rope_scaling"):
        part = hf.get(key)
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
        problems.append("'rope_parameters' and 'rope_scaling' differ, expected one of them")
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
