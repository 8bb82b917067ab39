"""The Mistral decoder."""

from models.common.decoder import Decoder


class Mistral(Decoder):
    """Mistral: the common decoder as it is. What is particular to it, the sliding window, is in its configuration."""
