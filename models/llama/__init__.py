"""Llama 3.2."""

from models.llama.config import LlamaConfig
from models.llama.model import Llama
from models.llama.weights import from_pretrained, save_pretrained

__all__ = ["Llama", "LlamaConfig", "from_pretrained", "save_pretrained"]
