"""Gemma 2 shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common import limits
from models.common.fields import Field, Flag, Integer, Nullable, OneOf, Real
from models.common.local_global import LOCAL_GLOBAL_FIELDS, LocalGlobalConfig

_CAP = Nullable(Real(1e-3, 1e6))
_GELU = OneOf("gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(LocalGlobalConfig):
    """A Gemma 2 decoder.

    Attributes:
      query_scalar: products of queries and keys are divided by the square root of this, instead of ``head_dim``.
      attention_cap: soft cap of attention scores, or None.
      final_cap: soft cap of logits, or None.
    """

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    fields = LOCAL_GLOBAL_FIELDS | {
        "tie_embeddings": Field("tie_word_embeddings", Flag(), True),
        "query_scalar": Field("query_pre_attn_scalar", Integer(1, limits.HIDDEN)),
        "attention_cap": Field("attn_logit_softcapping", _CAP, None),
        "final_cap": Field("final_logit_softcapping", _CAP, None),
    }
    options = LocalGlobalConfig.options | {
        "hidden_act": Field("hidden_act", _GELU, None),  # older
        "hidden_activation": Field("hidden_activation", _GELU, None),
        "use_bidirectional_attention": Field("use_bidirectional_attention", OneOf(False), None),
    }
    constants = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
    explicit = ("attention_cap", "final_cap", "num_kv_heads", "head_dim")
    default_theta = 10_000.0
    default_global_every = 2

    query_scalar: int
    attention_cap: float | None = None
    final_cap: float | None = None

    @classmethod
    def gemma_2_2b(cls) -> Self:
        return cls(
            vocab_size=256_000,
            hidden_size=2304,
            intermediate_size=9216,
            num_layers=26,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
            max_len=8192,
            sliding_window=4096,
            global_every=2,
            query_scalar=256,
            attention_cap=50.0,
            final_cap=30.0,
            eos_token_ids=(1,),
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """A local and a global layer for tests; the caps are low enough to matter."""
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
            sliding_window=24,
            global_every=2,
            query_scalar=24,
            attention_cap=5.0,
            final_cap=3.0,
        )
        return cls(**(fields | changes))
