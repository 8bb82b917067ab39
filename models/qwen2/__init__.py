"""Qwen2.5."""

from models.qwen2.config import Qwen2Config
from models.qwen2.model import Qwen2
from models.qwen2.weights import from_pretrained, save_pretrained

__all__ = ["Qwen2", "Qwen2Config", "from_pretrained", "save_pretrained"]
