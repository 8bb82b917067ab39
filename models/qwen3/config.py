"""Qwen3 dense shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common.rotary import RotaryConfig

_QWEN3 = dict(
    vocab_size=151_936,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    max_len=40_960,
    eos_token_ids=(151_645, 151_643),
)


@dataclasses.dataclass(frozen=True)
class Qwen3Config(RotaryConfig):
    """A dense Qwen3 decoder."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    default_theta = 1_000_000.0

    @classmethod
    def qwen3_0_6b(cls) -> Self:
        shape = dict(hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16)
        return cls(**shape, tie_embeddings=True, **_QWEN3)

    @classmethod
    def qwen3_1_7b(cls) -> Self:
        shape = dict(hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16)
        return cls(**shape, tie_embeddings=True, **_QWEN3)

    @classmethod
    def qwen3_4b(cls) -> Self:
        shape = dict(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32)
        return cls(**shape, tie_embeddings=True, **_QWEN3)

    @classmethod
    def qwen3_8b(cls) -> Self:
        shape = dict(hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32)
        return cls(**shape, tie_embeddings=False, **_QWEN3)

    @classmethod
    def qwen3_130m(cls) -> Self:
        """An unpublished shape of 130 million parameters, for machines on which 0.6B is too slow to wait for."""
        return cls(
            vocab_size=32_768,
            hidden_size=768,
            intermediate_size=2304,
            num_layers=15,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
            max_len=4096,
        )

    @classmethod
    def demo(cls) -> Self:
        """The shape of the checkpoint in ``models/demo``."""
        return cls(
            vocab_size=1536,
            hidden_size=192,
            intermediate_size=448,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
            max_len=1024,
            eos_token_ids=(0,),
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests; as in the published shapes, the heads are wider than the hidden state."""
        fields = dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
            max_len=512,
        )
        return cls(**(fields | changes))
