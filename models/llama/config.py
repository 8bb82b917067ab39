"""Llama 3.2 shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common.rotary import Llama3RopeScaling, RotaryConfig

_LLAMA_3_2 = dict(
    vocab_size=128_256,
    intermediate_size=8192,
    num_kv_heads=8,
    rope_theta=500_000.0,
    rope_scaling=Llama3RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192),
    norm_eps=1e-5,
    tie_embeddings=True,
    max_len=131_072,
    eos_token_ids=(128_001, 128_008, 128_009),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(RotaryConfig):
    """A Llama 3 decoder."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    default_theta = 10_000.0

    @classmethod
    def llama_3_2_1b(cls) -> Self:
        return cls(hidden_size=2048, num_layers=16, num_heads=32, head_dim=64, **_LLAMA_3_2)

    @classmethod
    def llama_3_2_3b(cls) -> Self:
        return cls(hidden_size=3072, num_layers=28, num_heads=24, head_dim=128, **_LLAMA_3_2)

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests, with a rope scaling whose three frequency ranges are all populated."""
        fields = dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=10_000.0,
            rope_scaling=Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=64),
            norm_eps=1e-5,
            tie_embeddings=True,
            max_len=512,
        )
        return cls(**(fields | changes))
