"""Gemma 3, the decoder for text."""

from models.gemma3.config import Gemma3Config
from models.gemma3.model import Gemma3
from models.gemma3.weights import from_pretrained, save_pretrained

__all__ = ["Gemma3", "Gemma3Config", "from_pretrained", "save_pretrained"]
