"""The bytes that a decode step cannot avoid to read."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from models.common.config import DecoderConfig
from models.common.decoder import Decoder
from models.common.initialize import num_bytes


class Traffic(NamedTuple):
    """Bytes that one step reads at least: every weight once, and the keys and values cached so far."""

    weights: int
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.kv


def step_traffic(model: Decoder, batch: int, cached: float) -> Traffic:
    """What a decode step reads when ``cached`` positions (an average over steps may be fractional) lie behind it.

    An embedding that is also the head is read whole; one that is not is only read in the rows of the batch's tokens.
    """
    weights = num_bytes(model)
    if not model.config.tie_embeddings:
        embedding = model.embed.embedding[...]
        weights -= embedding.nbytes - batch * embedding.nbytes // embedding.shape[0]
    return Traffic(weights, round(cached * kv_bytes(model.config, batch, jnp.dtype(model.dtype).itemsize)))


def kv_bytes(config: DecoderConfig, batch: int, itemsize: int) -> int:
    """Bytes of keys and values that one position takes in all layers."""
    return 2 * config.num_layers * batch * config.num_kv_heads * config.head_dim * itemsize
