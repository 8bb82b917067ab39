"""Hugging Face checkpoints of Qwen2."""

from models.common.checkpoint import Tensor, TensorMap
from models.common.names import LAYER, decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.qwen2.config import Qwen2Config
from models.qwen2.model import Qwen2

_BIASES = {("attention", part, "bias"): Tensor(f"self_attn.{part}_proj.bias") for part in ("q", "k", "v")}


def tensor_map(config: Qwen2Config) -> TensorMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    return decoder_tensors(config, {**LAYER, **_BIASES})


PRETRAINED = Pretrained(Qwen2, Qwen2Config, tensor_map, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
