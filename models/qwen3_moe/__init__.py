"""Qwen3 with a mixture of experts."""

from models.qwen3_moe.config import Qwen3MoeConfig
from models.qwen3_moe.model import Qwen3Moe
from models.qwen3_moe.weights import from_pretrained, save_pretrained

__all__ = ["Qwen3Moe", "Qwen3MoeConfig", "from_pretrained", "save_pretrained"]
