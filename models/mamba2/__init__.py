"""Mamba-2: language models without attention, whose cache does not grow."""

from models.mamba2.config import PRESETS, Mamba2Config
from models.mamba2.model import Mamba2, greedy_step, init_cache
from models.mamba2.weights import from_pretrained, random_model, save_pretrained

__all__ = [
    "PRESETS",
    "Mamba2",
    "Mamba2Config",
    "from_pretrained",
    "greedy_step",
    "init_cache",
    "random_model",
    "save_pretrained",
]
