"""Names that the checkpoints of most families share."""

from __future__ import annotations

from models.common.checkpoint import Stacked, Tensor, TensorMap
from models.common.config import DecoderConfig

# Checkpoints store linear layers as [out, in]; nnx.Linear keeps [in, out].
ATTENTION: TensorMap = {
    ("attention", "q", "kernel"): Tensor("self_attn.q_proj.weight", transpose=True),
    ("attention", "k", "kernel"): Tensor("self_attn.k_proj.weight", transpose=True),
    ("attention", "v", "kernel"): Tensor("self_attn.v_proj.weight", transpose=True),
    ("attention", "o", "kernel"): Tensor("self_attn.o_proj.weight", transpose=True),
}
HEAD_NORMS: TensorMap = {
    ("attention", "q_norm", "scale"): Tensor("self_attn.q_norm.weight"),
    ("attention", "k_norm", "scale"): Tensor("self_attn.k_norm.weight"),
}
GATED_MLP: TensorMap = {
    ("mlp", "gate", "kernel"): Tensor("mlp.gate_proj.weight", transpose=True),
    ("mlp", "up", "kernel"): Tensor("mlp.up_proj.weight", transpose=True),
    ("mlp", "down", "kernel"): Tensor("mlp.down_proj.weight", transpose=True),
}
PRE_NORMS: TensorMap = {
    ("attention_norm", "scale"): Tensor("input_layernorm.weight"),
    ("mlp_norm", "scale"): Tensor("post_attention_layernorm.weight"),
}
LAYER: TensorMap = {**ATTENTION, **GATED_MLP, **PRE_NORMS}
"""The parameters of a layer of Llama, by paths and names relative to it."""


def decoder_tensors(config: DecoderConfig, layer: TensorMap = LAYER, norm: str = "scale") -> TensorMap:
    """The tensors of a decoder.

    Args:
      layer: those of each layer, by paths and names relative to it.
      norm: what the parameter of a norm is called.
    """
    tensors: dict[tuple, Tensor | Stacked] = {
        ("embed", "embedding"): Tensor("model.embed_tokens.weight"),
        ("norm", norm): Tensor("model.norm.weight"),
    }
    if not config.tie_embeddings:
        tensors["head", "kernel"] = Tensor("lm_head.weight", transpose=True)
    return tensors | repeated(layer, config.num_layers, "model.layers.")


def repeated(layer: TensorMap, count: int, prefix: str) -> dict[tuple, Tensor | Stacked]:
    """The tensors of ``count`` layers, each of which has those of ``layer`` under its number."""
    return {
        ("layers", index, *path): tensor.under(f"{prefix}{index}.")
        for index in range(count)
        for path, tensor in layer.items()
    }


def ignored_tensors(config: DecoderConfig) -> list[str]:
    """Tensors that some checkpoints contain and the model computes or shares: a tied head, stored frequencies."""
    ignored = [f"model.layers.{index}.self_attn.rotary_emb.inv_freq" for index in range(config.num_layers)]
    return ignored + (["lm_head.weight"] if config.tie_embeddings else [])
