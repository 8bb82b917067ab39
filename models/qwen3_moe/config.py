"""Qwen3 shapes with a mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from models.common import limits
from models.common.errors import ConfigError
from models.common.fields import Field, Flag, Integer, OneOf, shown
from models.common.rotary import ROTARY_FIELDS, ROTARY_OPTIONS, RotaryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(RotaryConfig):
    """A Qwen3 decoder with experts in every layer; ``intermediate_size`` is that of one expert.

    Attributes:
      num_experts: experts of a layer.
      experts_per_token: how many of them each token goes through.
      renormalise: whether the weights of these add up to one.
    """

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    fields = ROTARY_FIELDS | {
        "intermediate_size": Field("moe_intermediate_size", Integer(1, limits.INTERMEDIATE)),
        "num_experts": Field("num_experts", Integer(1, limits.EXPERTS)),
        "experts_per_token": Field("num_experts_per_tok", Integer(1, limits.EXPERTS)),
        "renormalise": Field("norm_topk_prob", Flag(), False),
    }
    options = ROTARY_OPTIONS | {
        "decoder_sparse_step": Field("decoder_sparse_step", OneOf(1), None),
        "mlp_only_layers": Field("mlp_only_layers", OneOf([]), None),
    }
    constants = {"hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
    shape_fields = (*RotaryConfig.shape_fields, "num_experts", "experts_per_token")
    explicit = ("num_kv_heads", "head_dim")
    default_theta = 10_000.0

    num_experts: int
    experts_per_token: int
    renormalise: bool

    def _check(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.experts_per_token}, expected at most num_experts, which is "
                f"{self.num_experts}"
            )
        super()._check()

    @property
    def mlp_parameters(self) -> int:
        return self.num_experts * (super().mlp_parameters + self.hidden_size)

    @classmethod
    def _read(cls, hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        older, newer = hf.get("num_experts"), hf.get("num_local_experts")
        if older is None:
            return super()._read(dict(hf) | {"num_experts": newer}, problems)
        if newer is not None and newer != older:
            problems.append(
                f"'num_local_experts' is {shown(newer)} and 'num_experts' {shown(older)}, expected one value"
            )
        return super()._read(hf, problems)

    @classmethod
    def qwen3_30b_a3b(cls) -> Self:
        return cls(
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=768,
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            tie_embeddings=False,
            max_len=40_960,
            num_experts=128,
            experts_per_token=8,
            renormalise=True,
            eos_token_ids=(151_645, 151_643),
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests, in which a token goes through two of eight experts."""
        fields = dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tie_embeddings=False,
            max_len=512,
            num_experts=8,
            experts_per_token=2,
            renormalise=True,
        )
        return cls(**(fields | changes))
