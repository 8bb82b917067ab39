"""Hugging Face checkpoints of GPT-2."""

from models.common.checkpoint import Tensor, TensorMap
from models.common.names import repeated
from models.common.pretrained import Pretrained
from models.gpt2.config import GPT2Config
from models.gpt2.model import GPT2

# These checkpoints store linear layers as [in, out], as nnx.Linear does.
_LAYER = {
    ("attention_norm", "scale"): Tensor("ln_1.weight"),
    ("attention_norm", "bias"): Tensor("ln_1.bias"),
    ("attention", "qkv", "kernel"): Tensor("attn.c_attn.weight"),
    ("attention", "qkv", "bias"): Tensor("attn.c_attn.bias"),
    ("attention", "o", "kernel"): Tensor("attn.c_proj.weight"),
    ("attention", "o", "bias"): Tensor("attn.c_proj.bias"),
    ("mlp_norm", "scale"): Tensor("ln_2.weight"),
    ("mlp_norm", "bias"): Tensor("ln_2.bias"),
    ("mlp", "up", "kernel"): Tensor("mlp.c_fc.weight"),
    ("mlp", "up", "bias"): Tensor("mlp.c_fc.bias"),
    ("mlp", "down", "kernel"): Tensor("mlp.c_proj.weight"),
    ("mlp", "down", "bias"): Tensor("mlp.c_proj.bias"),
}


def tensor_map(config: GPT2Config) -> TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    tensors = {
        ("embed", "embedding"): Tensor("transformer.wte.weight"),
        ("positions", "embedding"): Tensor("transformer.wpe.weight"),
        ("norm", "scale"): Tensor("transformer.ln_f.weight"),
        ("norm", "bias"): Tensor("transformer.ln_f.bias"),
    }
    if not config.tie_embeddings:
        tensors["head", "kernel"] = Tensor("lm_head.weight", transpose=True)
    return tensors | repeated(_LAYER, config.num_layers, "transformer.h.")


def ignored_tensors(config: GPT2Config) -> list[str]:
    """Tensors that some checkpoints contain and the model computes or shares: a tied head, stored causal masks."""
    ignored = [f"transformer.h.{i}.attn.{name}" for i in range(config.num_layers) for name in ("bias", "masked_bias")]
    return ignored + (["lm_head.weight"] if config.tie_embeddings else [])


# The published checkpoints were saved without the head, and so without the prefix that sets it apart.
PRETRAINED = Pretrained(GPT2, GPT2Config, tensor_map, ignored_tensors, optional_prefix="transformer.")
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
