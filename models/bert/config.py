"""BERT shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common import limits
from models.common.fields import Field, Integer, OneOf, Real
from models.common.shape import OPTIONS, Shape, uneven


@dataclasses.dataclass(frozen=True)
class BertConfig(Shape):
    """A post-norm encoder with learned absolute positions and an erf GELU."""

    model_type = "bert"
    architecture = "BertModel"
    fields = {
        "vocab_size": Field("vocab_size", Integer(1, limits.VOCABULARY)),
        "hidden_size": Field("hidden_size", Integer(1, limits.HIDDEN)),
        "intermediate_size": Field("intermediate_size", Integer(1, limits.INTERMEDIATE)),
        "num_layers": Field("num_hidden_layers", Integer(1, limits.LAYERS)),
        "num_heads": Field("num_attention_heads", Integer(1, limits.HEADS)),
        "max_len": Field("max_position_embeddings", Integer(1, limits.CONTEXT)),
        "num_types": Field("type_vocab_size", Integer(1, limits.VOCABULARY), 2),
        "norm_eps": Field("layer_norm_eps", Real(1e-14, 1.0), 1e-12),
    }
    options = OPTIONS | {
        "hidden_act": Field("hidden_act", OneOf("gelu"), None),
        "position_embedding_type": Field("position_embedding_type", OneOf("absolute"), None),
        "is_decoder": Field("is_decoder", OneOf(False), None),
        "add_cross_attention": Field("add_cross_attention", OneOf(False), None),
    }
    constants = {"hidden_act": "gelu", "position_embedding_type": "absolute"}

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_len: int = 512
    num_types: int = 2
    norm_eps: float = 1e-12

    def conflicts(self) -> list[str]:
        return uneven(self.hidden_size, self.num_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def bert_base(cls) -> Self:
        return cls(vocab_size=30_522, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12)

    @classmethod
    def minilm_l6(cls) -> Self:
        """The shape of all-MiniLM-L6-v2."""
        return cls(vocab_size=30_522, hidden_size=384, intermediate_size=1536, num_layers=6, num_heads=12)

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests."""
        fields = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, max_len=40)
        return cls(**(fields | changes))


PRESETS = {"bert-base": BertConfig.bert_base, "minilm-l6": BertConfig.minilm_l6, "bert-tiny": BertConfig.tiny}
"""Shapes by name."""
