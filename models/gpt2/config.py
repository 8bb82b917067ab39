"""GPT-2 shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common import limits
from models.common.config import FIELDS, DecoderConfig
from models.common.errors import ConfigError
from models.common.fields import Field, Flag, Integer, OneOf, Real
from models.common.shape import OPTIONS, filled

_GPT2 = dict(vocab_size=50_257, norm_eps=1e-5, tie_embeddings=True, max_len=1024, eos_token_ids=(50_256,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """A GPT-2 decoder. Every query head has a key/value head of its own, and all heads together are as wide as the model."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    fields = {
        "vocab_size": FIELDS["vocab_size"],
        "hidden_size": Field("n_embd", Integer(1, limits.HIDDEN)),
        "intermediate_size": Field("n_inner", Integer(1, limits.INTERMEDIATE), None),
        "num_layers": Field("n_layer", Integer(1, limits.LAYERS)),
        "num_heads": Field("n_head", Integer(1, limits.HEADS)),
        "norm_eps": Field("layer_norm_epsilon", Real(1e-12, 1.0), 1e-5),
        "tie_embeddings": Field("tie_word_embeddings", Flag(), True),
        "max_len": Field("n_positions", Integer(1, limits.CONTEXT)),
        "eos_token_ids": FIELDS["eos_token_ids"],
    }
    options = OPTIONS | {
        "activation_function": Field("activation_function", OneOf("gelu_new"), None),
        "scale_attn_weights": Field("scale_attn_weights", OneOf(True), None),
        "scale_attn_by_inverse_layer_idx": Field("scale_attn_by_inverse_layer_idx", OneOf(False), None),
        "reorder_and_upcast_attn": Field("reorder_and_upcast_attn", OneOf(False), None),
        "add_cross_attention": Field("add_cross_attention", OneOf(False), None),
    }
    constants = {"activation_function": "gelu_new"}

    num_kv_heads: int = dataclasses.field(init=False)
    head_dim: int = dataclasses.field(init=False)

    def _check(self) -> None:
        hidden, heads = self.hidden_size, self.num_heads
        if hidden % heads:
            raise ConfigError(f"hidden_size is {hidden}, expected a multiple of {heads} heads")
        object.__setattr__(self, "num_kv_heads", heads)
        object.__setattr__(self, "head_dim", hidden // heads)
        super()._check()

    @property
    def mlp_parameters(self) -> int:
        return 2 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        return super().num_parameters + self.max_len * self.hidden_size

    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        return filled(values, intermediate_size=4 * values["hidden_size"])

    @classmethod
    def gpt2(cls) -> Self:
        return cls(hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, **_GPT2)

    @classmethod
    def gpt2_medium(cls) -> Self:
        return cls(hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, **_GPT2)

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests."""
        fields = dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=256,
            num_layers=2,
            num_heads=4,
            norm_eps=1e-5,
            tie_embeddings=True,
            max_len=512,
        )
        return cls(**(fields | changes))
