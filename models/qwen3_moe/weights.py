"""Hugging Face checkpoints of Qwen3 with a mixture of experts."""

from models.common.checkpoint import Stacked, Tensor, TensorMap
from models.common.names import ATTENTION, HEAD_NORMS, PRE_NORMS, decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.qwen3_moe.config import Qwen3MoeConfig
from models.qwen3_moe.model import Qwen3Moe


def tensor_map(config: Qwen3MoeConfig) -> TensorMap:
    """Each parameter of the model to its tensor in a checkpoint, which has one for each expert."""
    experts = range(config.num_experts)
    layer = {
        **ATTENTION,
        **HEAD_NORMS,
        **PRE_NORMS,
        ("mlp", "router", "kernel"): Tensor("mlp.gate.weight", transpose=True),
    }
    for part in ("gate", "up", "down"):
        names = (f"mlp.experts.{expert}.{part}_proj.weight" for expert in experts)
        layer["mlp", part] = Stacked(tuple(Tensor(name, transpose=True) for name in names))
    return decoder_tensors(config, layer)


PRETRAINED = Pretrained(Qwen3Moe, Qwen3MoeConfig, tensor_map, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
