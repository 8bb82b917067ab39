"""Greedy transcription, from the features of a sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.common.errors import UsageError
from models.whisper.model import Cache, Whisper


def listen(graphdef: nnx.GraphDef, state: Any, features: jax.Array, max_len: int) -> Cache:
    """The cache before the first token of a text about ``features``; see ``Whisper.encode`` and ``Whisper.init_cache``."""
    model = nnx.merge(graphdef, state)
    return model.init_cache(model.encode(features), max_len)


def greedy_step(
    graphdef: nnx.GraphDef, state: Any, token: jax.Array, cache: Cache, pos: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
    """The likeliest token after ``token`` (int32 ``[B]``) at ``pos``; float32 logits ``[B, V]``; the updated cache."""
    logits, cache = nnx.merge(graphdef, state)(token[:, None], cache, pos)
    return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), logits[:, 0], cache


def transcribe(
    model: Whisper,
    features: jax.Array,
    *,
    prompt: Sequence[int] = (),
    max_new_tokens: int,
    wrap: Callable[[Callable], Callable] = lambda step: step,
) -> np.ndarray:
    """Write down what is heard.

    Args:
      features: ``[B, 2 * audio_len, num_mel_bins]``, a log-mel spectrogram of each sound.
      prompt: tokens after the start token, such as those of a language and a task.
      wrap: applied to the decode step before ``jax.jit``.

    Returns:
      int32 ``[B, N]``, the likeliest tokens after the prompt, where ``N <= max_new_tokens``: it ends once every text has
      ended. A text that ends earlier goes on with its end token.

    Raises:
      UsageError: the tokens do not fit the model's context, or the features not its encoder.
    """
    config = model.config
    given = [config.start_token, *prompt]
    total = len(given) + max_new_tokens
    if total > config.max_len:
        raise UsageError(f"{len(given)} tokens and {max_new_tokens} new ones exceed the context of {config.max_len}")
    expected = (2 * config.audio_len, config.num_mel_bins)
    if features.ndim != 3 or features.shape[1:] != expected:
        raise UsageError(f"the features are {list(features.shape)}, expected [batch, {expected[0]}, {expected[1]}]")
    if not max_new_tokens:
        return np.zeros((features.shape[0], 0), np.int32)
    graphdef, state = nnx.split(model)
    cache = jax.jit(partial(listen, graphdef, max_len=total))(state, features)
    step = jax.jit(wrap(partial(greedy_step, graphdef)), donate_argnums=2)
    found: list[np.ndarray] = []
    ended = np.zeros(features.shape[0], bool)
    token = None
    for pos in range(total - 1):
        if pos < len(given):
            token = np.full(features.shape[0], given[pos], np.int32)
        following, _, cache = step(state, token, cache, np.int32(pos))
        if pos + 1 >= len(given):
            token = np.where(ended, config.eos_token, np.asarray(following)).astype(np.int32)
            found.append(token)
            ended |= token == config.eos_token
            if ended.all():
                break
    return np.stack(found, axis=1)
