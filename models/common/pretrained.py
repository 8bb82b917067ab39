"""Loading and saving the checkpoints of a family, given what its tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.common import checkpoint
from models.common.config import DecoderConfig
from models.common.decoder import Decoder

Config = TypeVar("Config", bound=DecoderConfig)
Model = TypeVar("Model", bound=Decoder)


@dataclasses.dataclass(frozen=True)
class Pretrained(Generic[Model, Config]):
    """The checkpoints of a family.

    Attributes:
      tensor_map: each parameter of a model of some configuration to its tensor in a checkpoint.
      ignored: tensors that may be there and are not used.
      optional_prefix: what names begin with, unless no name in the checkpoint does.
    """

    model: type[Model]
    config: type[Config]
    tensor_map: Callable[[Config], checkpoint.TensorMap]
    ignored: Callable[[Config], Iterable[str]]
    optional_prefix: str = ""

    def load(
        self,
        directory: Path | str,
        *,
        config: Config | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        progress: Callable[[int, int], None] | None = None,
    ) -> Model:
        """Load a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

        Raises:
          CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
          ConfigError: ``config.json`` describes something that is not supported.
        """
        if config is None:
            config = checkpoint.load_config(self.config, directory)
        return checkpoint.load_model(
            self.model,
            config,
            directory,
            self.tensor_map(config),
            dtype=dtype,
            ignore=self.ignored(config),
            optional_prefix=self.optional_prefix,
            progress=progress,
        )

    def save(
        self, model: Model, directory: Path | str, *, dtype: DTypeLike | None = None, max_file_bytes: int = 5 << 30
    ) -> None:
        """Write ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
        config = model.config
        checkpoint.save_model(
            model, directory, self.tensor_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes
        )
