"""Tensors by the names that a checkpoint has for them, for models whose parameters are not those of a plain decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.common import checkpoint


class _NoConfig:
    """Stands in for a configuration: what the names and shapes are has been said."""

    def replace(self, **changes: Any) -> Self:
        return self


def load_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path | str,
    *,
    dtype: DTypeLike,
    ignore: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """The tensors of a checkpoint, as ``dtype``; arguments and errors as of ``checkpoint.load_model``.

    That one fills modules of ``flax.nnx``. A dictionary of tensors is one, so that all it checks is checked here too.
    """

    def model(_: _NoConfig, *, dtype: DTypeLike, rngs: Any) -> nnx.Dict:
        return nnx.Dict({name: nnx.Param(jnp.zeros(shape, dtype)) for name, shape in shapes.items()})

    names = {(name,): checkpoint.Tensor(name) for name in shapes}
    found = checkpoint.load_model(model, _NoConfig(), directory, names, dtype=dtype, ignore=ignore, progress=progress)
    return {name: found[name][...] for name in shapes}
