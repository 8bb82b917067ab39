"""What is wrong with what a user gave. Every other exception of this package is a bug in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.common.fields import plain


class ModelError(ValueError):
    """The base of all errors here; the message names the file, the field, and what would be right."""


class UsageError(ModelError):
    """What was asked for cannot be done; the message says why."""


class ConfigError(ModelError):
    """A model configuration, usually a ``config.json``, lacks a field or asks for something not supported."""


class TokenizerError(ModelError):
    """A ``tokenizer.json`` is absent or unreadable, or does not fit the model."""


class CheckpointError(ModelError):
    """The files of a checkpoint cannot be read, or do not fit the model.

    Everything found wrong is collected first, so one error lists all of it.

    Attributes:
      missing: tensors that the model needs and the checkpoint lacks.
      unexpected: tensors that the checkpoint has and the model does not know.
      misshapen: tensors of the wrong shape or an unsupported type, each with what was found and expected.
      corrupt: files that are absent, truncated, no regular files or not of their format, each with the reason.
    """

    def __init__(
        self,
        where: Path,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[str] = (),
        corrupt: Iterable[str] = (),
    ):
        self.missing, self.unexpected = list(missing), list(unexpected)
        self.misshapen, self.corrupt = list(misshapen), list(corrupt)
        lines = [f"cannot load the checkpoint {plain(where)}"]
        for kind in ("corrupt", "missing", "unexpected", "misshapen"):
            found = getattr(self, kind)
            if found:
                more = f", and {len(found) - 8} more" if len(found) > 8 else ""
                lines.append(f"  {len(found)} {kind}: {', '.join(map(plain, found[:8]))}{more}")
        super().__init__("\n".join(lines))
