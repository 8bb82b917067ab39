"""Whisper: speech to text, from log-mel spectrograms."""

from models.whisper.config import PRESETS, WhisperConfig
from models.whisper.model import Whisper
from models.whisper.transcribe import greedy_step, listen, transcribe
from models.whisper.weights import from_pretrained, save_pretrained

__all__ = [
    "PRESETS",
    "Whisper",
    "WhisperConfig",
    "from_pretrained",
    "greedy_step",
    "listen",
    "save_pretrained",
    "transcribe",
]
