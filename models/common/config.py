"""Hyper-parameters that every decoder family has, and the rotary scaling that some add."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


class ConfigError(ValueError):
    """A model configuration, usually a ``config.json``, lacks a field or asks for something not supported."""


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


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a pre-norm decoder with grouped-query attention, rotary positions and a SwiGLU feed-forward block.

    Frozen and hashable, so it can be a static argument of ``jax.jit``.
    """

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
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"rotary embedding rotates pairs, so head_dim must be even, not {self.head_dim}")

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


def require(hf: Mapping[str, Any], key: str) -> Any:
    """``hf[key]``, or a ``ConfigError`` that names the key."""
    if hf.get(key) is None:
        raise ConfigError(f"config.json has no '{key}'")
    return hf[key]


def check_supported(hf: Mapping[str, Any], model_type: str) -> None:
    """Raise ``ConfigError`` if a ``config.json`` describes another architecture or options that are not implemented."""
    if hf.get("model_type", model_type) != model_type:
        raise ConfigError(f"expected model_type '{model_type}', config.json says '{hf['model_type']}'")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act '{hf['hidden_act']}' is not supported, only 'silu'")
    for flag in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if hf.get(flag):
            raise ConfigError(f"config.json sets '{flag}', which is not supported")


def rope_from_hf(hf: Mapping[str, Any], default_theta: float) -> tuple[float, Llama3RopeScaling | None]:
    """Rotary base and scaling of a ``config.json``, in the older spelling or the newer ``rope_parameters`` one."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", hf.get("rope_theta", default_theta))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConfigError(f"rope scaling '{kind}' is not supported, only 'llama3'")
    return float(theta), Llama3RopeScaling(
        factor=float(require(scaling, "factor")),
        low_freq_factor=float(require(scaling, "low_freq_factor")),
        high_freq_factor=float(require(scaling, "high_freq_factor")),
        original_max_len=int(require(scaling, "original_max_position_embeddings")),
    )


def fields_from_hf(hf: Mapping[str, Any], *, default_theta: float, default_tied: bool) -> dict[str, Any]:
    """The ``DecoderConfig`` fields of a ``config.json``; raises ``ConfigError`` for a missing one."""
    theta, scaling = rope_from_hf(hf, default_theta)
    heads, hidden = int(require(hf, "num_attention_heads")), int(require(hf, "hidden_size"))
    eos = hf.get("eos_token_id")
    return dict(
        vocab_size=int(require(hf, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(require(hf, "intermediate_size")),
        num_layers=int(require(hf, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=int(hf.get("head_dim") or hidden // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", default_tied)),
        max_len=int(require(hf, "max_position_embeddings")),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def fields_to_hf(config: DecoderConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of ``fields_from_hf``: a dictionary to be written as ``config.json``."""
    scaling = config.rope_scaling
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        },
        "max_position_embeddings": config.max_len,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_token_ids) or None,
    }
