"""Hugging Face checkpoints of Gemma 3, of those models that read text only."""

from models.common.checkpoint import Tensor, TensorMap
from models.common.names import decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.gemma2.weights import LAYER
from models.gemma3.config import Gemma3Config
from models.gemma3.model import Gemma3

_HEAD_NORMS = {
    ("attention", "q_norm", "offset"): Tensor("self_attn.q_norm.weight"),
    ("attention", "k_norm", "offset"): Tensor("self_attn.k_norm.weight"),
}


def tensor_map(config: Gemma3Config) -> TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    return decoder_tensors(config, {**LAYER, **_HEAD_NORMS}, norm="offset")


PRETRAINED = Pretrained(Gemma3, Gemma3Config, tensor_map, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
