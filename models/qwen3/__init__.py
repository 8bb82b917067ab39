"""Qwen3 (dense)."""

from models.qwen3.config import Qwen3Config
from models.qwen3.model import Qwen3
from models.qwen3.weights import from_pretrained, save_pretrained

__all__ = ["Qwen3", "Qwen3Config", "from_pretrained", "save_pretrained"]
