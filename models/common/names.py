"""Names that Llama and Qwen3 checkpoints share."""

from __future__ import annotations

from models.common.checkpoint import Tensor, TensorMap
from models.common.config import DecoderConfig

# Checkpoints store linear layers as [out, in]; nnx.Linear keeps [in, out].
_LAYER = {
    ("attention_norm", "scale"): Tensor("input_layernorm.weight"),
    ("attention", "q", "kernel"): Tensor("self_attn.q_proj.weight", transpose=True),
    ("attention", "k", "kernel"): Tensor("self_attn.k_proj.weight", transpose=True),
    ("attention", "v", "kernel"): Tensor("self_attn.v_proj.weight", transpose=True),
    ("attention", "o", "kernel"): Tensor("self_attn.o_proj.weight", transpose=True),
    ("mlp_norm", "scale"): Tensor("post_attention_layernorm.weight"),
    ("mlp", "gate", "kernel"): Tensor("mlp.gate_proj.weight", transpose=True),
    ("mlp", "up", "kernel"): Tensor("mlp.up_proj.weight", transpose=True),
    ("mlp", "down", "kernel"): Tensor("mlp.down_proj.weight", transpose=True),
}


def decoder_tensors(config: DecoderConfig, extra_layer: TensorMap | None = None) -> TensorMap:
    """The tensors of a decoder; ``extra_layer`` adds some to every layer, by paths and names relative to it."""
    tensors = {
        ("embed", "embedding"): Tensor("model.embed_tokens.weight"),
        ("norm", "scale"): Tensor("model.norm.weight"),
    }
    if not config.tie_embeddings:
        tensors["head", "kernel"] = Tensor("lm_head.weight", transpose=True)
    for index in range(config.num_layers):
        for path, tensor in (_LAYER | dict(extra_layer or {})).items():
            name = f"model.layers.{index}.{tensor.name}"
            tensors["layers", index, *path] = Tensor(name, tensor.transpose)
    return tensors


def ignored_tensors(config: DecoderConfig) -> list[str]:
    """Tensors that some checkpoints contain and the model computes or shares: a tied head, stored frequencies."""
    ignored = [f"model.layers.{index}.self_attn.rotary_emb.inv_freq" for index in range(config.num_layers)]
    return ignored + (["lm_head.weight"] if config.tie_embeddings else [])
