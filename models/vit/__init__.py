"""Vision transformers that classify images."""

from models.vit.config import PRESETS, ViTConfig
from models.vit.model import ViT
from models.vit.weights import from_pretrained, random_model, save_pretrained

__all__ = ["PRESETS", "ViT", "ViTConfig", "from_pretrained", "random_model", "save_pretrained"]
