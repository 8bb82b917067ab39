"""Tokenizers from ``tokenizer.json``, and streaming text that never shows half a character."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from models.common import limits
from models.common.errors import TokenizerError
from models.common.fields import plain
from models.common.files import FileError, read_bytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer in ``directory / "tokenizer.json"``; raises ``TokenizerError`` if it is absent or malformed.

    Truncation and padding that the file may ask for are switched off: they are for training, and would change a prompt.
    """
    path = Path(directory) / "tokenizer.json"
    try:
        content = read_bytes(path, limits.TOKENIZER_BYTES)
    except FileError as error:
        raise TokenizerError(f"cannot read {plain(path)}: {error}") from error
    with _errors_named(f"cannot read {plain(path)}: not a tokenizer"):
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of ``text``; raises ``TokenizerError`` if the tokenizer has none for a part of it."""
    with _errors_named("the tokenizer cannot encode the text"):
        return tokenizer.encode(text).ids


@contextlib.contextmanager
def _errors_named(what: str) -> Iterator[None]:
    """Turn what the library raises into a ``TokenizerError``: plain Exception, or a BaseException if its Rust panics."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise TokenizerError(f"{what}: {plain(error)}") from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ``TokenizerError`` if there are token ids that a model of ``vocab_size`` does not know.

    A model with more rows than the tokenizer has tokens is fine: published models pad their vocabulary.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise TokenizerError(f"the tokenizer has token {largest}, but the model's vocabulary ends at {vocab_size - 1}")


class StreamDecoder:
    """Turns a stream of tokens into a stream of text.

    A token may end in the middle of a UTF-8 character, and how a token decodes may depend on the one before it. So text
    is held back while it ends in an incomplete character, and what is decoded always starts at an earlier token whose
    text has already been shown.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here
        self._shown = 0  # tokens before this one have been returned as text

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now complete, perhaps none."""
        self._tokens.append(token)
        return self._advance(hold_back=True)

    def flush(self) -> str:
        """The rest, with an incomplete character shown as the replacement character."""
        return self._advance(hold_back=False)

    def _advance(self, hold_back: bool) -> str:
        with _errors_named("the tokenizer cannot decode its tokens"):
            before = self._tokenizer.decode(self._tokens[self._context : self._shown])
            text = self._tokenizer.decode(self._tokens[self._context :])
        if hold_back and text.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]
