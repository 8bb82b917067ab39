"""The Llama 3 decoder."""

from models.common.decoder import Decoder


class Llama(Decoder):
    """Llama 3: the common decoder as it is. What is particular to it, the rope scaling, is in its configuration."""
