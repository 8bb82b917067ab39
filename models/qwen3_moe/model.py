"""The Qwen3 decoder with a mixture of experts in place of each feed-forward block."""

from models.common.decoder import Decoder
from models.qwen3.model import Qwen3Block
from models.qwen3_moe.experts import Experts


class Qwen3MoeBlock(Qwen3Block):
    """A layer with experts."""

    mlp_class = Experts


class Qwen3Moe(Decoder):
    """A Qwen3 decoder with experts."""

    block_class = Qwen3MoeBlock
