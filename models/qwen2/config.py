"""Qwen2.5 shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common.fields import Field, OneOf
from models.common.rotary import ROTARY_OPTIONS, RotaryConfig

_QWEN2_5 = dict(
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    max_len=32_768,
    eos_token_ids=(151_645, 151_643),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(RotaryConfig):
    """A Qwen2 or Qwen2.5 decoder. Its checkpoints name a sliding window that they do not use."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    # Queries, keys and values always have biases, and nothing else has: a field about it means some other model.
    options = ROTARY_OPTIONS | {"attention_bias": Field("attention_bias", OneOf(True), None)}
    constants = {"hidden_act": "silu", "use_sliding_window": False}
    explicit = ("num_kv_heads",)
    default_theta = 10_000.0

    @classmethod
    def qwen2_5_0_5b(cls) -> Self:
        shape = dict(hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64)
        return cls(vocab_size=151_936, **shape, tie_embeddings=True, **_QWEN2_5)

    @classmethod
    def qwen2_5_1_5b(cls) -> Self:
        shape = dict(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_kv_heads=2)
        return cls(vocab_size=151_936, head_dim=128, **shape, tie_embeddings=True, **_QWEN2_5)

    @classmethod
    def qwen2_5_7b(cls) -> Self:
        shape = dict(hidden_size=3584, intermediate_size=18_944, num_layers=28, num_heads=28, num_kv_heads=4)
        return cls(vocab_size=152_064, head_dim=128, **shape, tie_embeddings=False, **_QWEN2_5)

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests; an odd number of query heads share a key head, as in the published shapes."""
        fields = dict(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=128,
            num_layers=2,
            num_heads=6,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
            max_len=512,
        )
        return cls(**(fields | changes))
