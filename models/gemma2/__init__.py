"""Gemma 2, the decoder for text."""

from models.gemma2.config import Gemma2Config
from models.gemma2.model import Gemma2
from models.gemma2.weights import from_pretrained, save_pretrained

__all__ = ["Gemma2", "Gemma2Config", "from_pretrained", "save_pretrained"]
