"""Mistral 7B."""

from models.mistral.config import MistralConfig
from models.mistral.model import Mistral
from models.mistral.weights import from_pretrained, save_pretrained

__all__ = ["Mistral", "MistralConfig", "from_pretrained", "save_pretrained"]
