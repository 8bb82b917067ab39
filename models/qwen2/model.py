"""The Qwen2 decoder: the common one, with biases on queries, keys and values."""

from models.common.block import Attention, Block
from models.common.decoder import Decoder


class Qwen2Attention(Attention):
    """Attention whose queries, keys and values have biases; its output has none."""

    use_bias = True


class Qwen2Block(Block):
    """A layer with such attention."""

    attention_class = Qwen2Attention


class Qwen2(Decoder):
    """A Qwen2 or Qwen2.5 decoder."""

    block_class = Qwen2Block
