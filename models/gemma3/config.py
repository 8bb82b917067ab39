"""Gemma 3 shapes, of those models that read text only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from models.common.fields import Field, Real
from models.common.local_global import GLOBAL, LOCAL
from models.common.rotary import read_rope
from models.gemma2.config import Gemma2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """A Gemma 3 decoder. The rope base and scaling of its superclasses are those of global layers.

    Attributes:
      local_theta: the rope base of local layers, which have no scaling.
    """

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    fields = Gemma2Config.fields | {"local_theta": Field("rope_local_base_freq", Real(1.0, 1e12), None)}
    explicit = ("num_kv_heads", "head_dim")
    default_theta = 1_000_000.0
    default_global_every = 6

    local_theta: float

    @classmethod
    def _read(cls, hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        values = super()._read(hf, problems)
        place = f"rope_parameters.{LOCAL}"
        found = read_rope({place: _rope_by_kind(hf).get(LOCAL)}, values.get("local_theta"), problems)
        if found["rope_scaling"] is not None:
            problems.append(f"'{place}.rope_type' is 'llama3', expected 'default'")
        theta = found["rope_theta"]
        return values | {"local_theta": 10_000.0 if theta is None else theta}

    @classmethod
    def _rope_parts(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        by_kind = _rope_by_kind(hf)
        if not by_kind:
            return super()._rope_parts(hf)
        strange = {f"rope_parameters.{kind}": by_kind[kind] for kind in by_kind if kind != LOCAL}
        return strange | {"rope_scaling": hf.get("rope_scaling")}

    @classmethod
    def gemma_3_1b(cls) -> Self:
        return cls(
            vocab_size=262_144,
            hidden_size=1152,
            intermediate_size=6912,
            num_layers=26,
            num_heads=4,
            num_kv_heads=1,
            head_dim=256,
            rope_theta=1_000_000.0,
            local_theta=10_000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
            max_len=32_768,
            sliding_window=512,
            global_every=6,
            query_scalar=256,
            eos_token_ids=(1, 106),
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two local layers and a global one for tests."""
        fields = dict(
            num_layers=3,
            num_kv_heads=1,
            rope_theta=100_000.0,
            local_theta=10_000.0,
            global_every=3,
            attention_cap=None,
            final_cap=None,
        )
        return super().tiny(**(fields | changes))


def _rope_by_kind(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The newer spelling, ``rope_parameters`` with an object for each kind of layer; empty if it is not there."""
    found = hf.get("rope_parameters")
    return found if isinstance(found, Mapping) and {LOCAL, GLOBAL} & found.keys() else {}
