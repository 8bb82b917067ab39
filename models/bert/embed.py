"""Sentence embeddings: the mean over a sentence's tokens, of length one, so that a dot product is a cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from models.common.errors import UsageError
from models.common.tokenizer import encode


def embed(graphdef: nnx.GraphDef, state: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The embedding of each sequence of a padded batch.

    Args:
      graphdef, state: ``nnx.split`` of a ``Bert``.
      tokens: int32 ``[B, T]``.
      mask: int32 ``[B, T]``, 1 for tokens and 0 for padding; at least one token in each row.

    Returns:
      float32 ``[B, hidden_size]`` of length 1.
    """
    hidden = nnx.merge(graphdef, state)(tokens, mask).astype(jnp.float32)
    weights = mask.astype(jnp.float32)[:, :, None]
    mean = jnp.sum(hidden * weights, axis=1) / jnp.sum(weights, axis=1)
    return mean / jnp.sqrt(jnp.sum(mean * mean, axis=-1, keepdims=True))


def batch_of(tokenizer: Tokenizer, texts: Sequence[str], max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int32 ``[B, T]`` each, of ``texts``, padded to the longest of them.

    Raises:
      UsageError: a text is empty or has more than ``max_len`` tokens.
      TokenizerError: a text cannot be encoded.
    """
    ids = [encode(tokenizer, text) for text in texts]
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise UsageError("a sentence has no tokens: it is empty")
        if len(row) > max_len:
            raise UsageError(
                f"the sentence that begins {text[:20]!r} has {len(row)} tokens, expected at most {max_len}"
            )
    length = max(map(len, ids))
    tokens = np.array([row + [0] * (length - len(row)) for row in ids], np.int32)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in ids], np.int32)
    return tokens, mask
