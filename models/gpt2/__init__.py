"""GPT-2."""

from models.gpt2.config import GPT2Config
from models.gpt2.model import GPT2
from models.gpt2.weights import from_pretrained, save_pretrained

__all__ = ["GPT2", "GPT2Config", "from_pretrained", "save_pretrained"]
