"""Mistral shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common import limits
from models.common.fields import Field, Integer, Nullable
from models.common.rotary import ROTARY_FIELDS, RotaryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(RotaryConfig):
    """A Mistral decoder.

    Attributes:
      sliding_window: how many positions each query sees, itself included; None sees all before it, as since v0.2.
    """

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    fields = ROTARY_FIELDS | {
        "sliding_window": Field("sliding_window", Nullable(Integer(1, limits.CONTEXT)), None),
    }
    explicit = ("sliding_window", "num_kv_heads")
    default_theta = 10_000.0

    sliding_window: int | None = None

    def window(self, layer: int) -> int | None:
        return self.sliding_window

    @classmethod
    def mistral_7b(cls) -> Self:
        """Version 0.3."""
        return cls(
            vocab_size=32_768,
            hidden_size=4096,
            intermediate_size=14_336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=1_000_000.0,
            norm_eps=1e-5,
            tie_embeddings=False,
            max_len=32_768,
            eos_token_ids=(2,),
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests, with a window that is shorter than their context, as in v0.1."""
        fields = dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            tie_embeddings=False,
            max_len=512,
            sliding_window=24,
        )
        return cls(**(fields | changes))
