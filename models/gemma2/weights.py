"""Hugging Face checkpoints of Gemma 2."""

from models.common.checkpoint import Tensor, TensorMap
from models.common.names import ATTENTION, GATED_MLP, decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.gemma2.config import Gemma2Config
from models.gemma2.model import Gemma2

LAYER: TensorMap = {
    **ATTENTION,
    **GATED_MLP,
    ("attention_norm", "offset"): Tensor("input_layernorm.weight"),
    ("attention_post_norm", "offset"): Tensor("post_attention_layernorm.weight"),
    ("mlp_norm", "offset"): Tensor("pre_feedforward_layernorm.weight"),
    ("mlp_post_norm", "offset"): Tensor("post_feedforward_layernorm.weight"),
}


def tensor_map(config: Gemma2Config) -> TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    return decoder_tensors(config, LAYER, norm="offset")


PRETRAINED = Pretrained(Gemma2, Gemma2Config, tensor_map, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
