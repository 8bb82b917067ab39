"""Hugging Face checkpoints of Qwen3."""

from models.common.checkpoint import TensorMap
from models.common.names import HEAD_NORMS, LAYER, decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.qwen3.config import Qwen3Config
from models.qwen3.model import Qwen3


def tensor_map(config: Qwen3Config) -> TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    return decoder_tensors(config, {**LAYER, **HEAD_NORMS})


PRETRAINED = Pretrained(Qwen3, Qwen3Config, tensor_map, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
