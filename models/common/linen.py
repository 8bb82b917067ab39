"""Parameters of flax.linen models: described, at random, from a checkpoint and to one.

Checkpoints are read and written as dictionaries of tensors; see ``models.common.tensors``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from models.common import checkpoint
from models.common.initialize import random_leaf
from models.common.tensors import load_tensors

Params = dict[str, Any]
"""The parameters of a linen module: dictionaries of dictionaries of arrays."""


class Stored(NamedTuple):
    """Where a parameter lies in a checkpoint, and which axes of the tensor there are its own, one after the other."""

    name: str
    axes: tuple[int, ...] | None = None


LINEAR = (1, 0)
"""Checkpoints store linear layers as [out, in]; linen keeps [in, out]."""

StoredMap = Mapping[tuple[str, ...], Stored]
"""Path of a parameter to its tensor."""


def describe(module: nn.Module, *inputs: Any) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its path; ``inputs`` are arguments or descriptions of some."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return traverse_util.flatten_dict(variables["params"])


def random_params(
    module: nn.Module,
    *inputs: Any,
    seed: int = 0,
    special: Callable[[str, tuple[int, ...]], np.ndarray | None] = lambda name, shape: None,
) -> Params:
    """Random parameters, made on the host: those of ``models.common.initialize``, where a fan-in is all axes but the last.

    Args:
      special: gives the value of parameters of some names that are to be something else.
    """
    params = {}
    for path, leaf in describe(module, *inputs).items():
        value = special(path[-1], leaf.shape)
        if value is None:
            matrix = (math.prod(leaf.shape[:-1]), leaf.shape[-1]) if leaf.ndim > 2 else leaf.shape
            value = random_leaf(path, matrix, leaf.dtype, seed)
        params[path] = jnp.asarray(value.reshape(leaf.shape), leaf.dtype)
    return traverse_util.unflatten_dict(params)


def load_params(
    module: nn.Module,
    *inputs: Any,
    directory: Path | str,
    stored: StoredMap,
    dtype: DTypeLike,
    ignore: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """The parameters of ``module`` in a checkpoint, as ``dtype``; arguments and errors as of ``checkpoint.load_model``."""
    shapes = {}
    for path, leaf in describe(module, *inputs).items():
        name, axes = stored[path]
        shapes[name] = leaf.shape if axes is None else tuple(leaf.shape[axes.index(axis)] for axis in range(leaf.ndim))

    found = load_tensors(shapes, directory, dtype=dtype, ignore=ignore, progress=progress)
    params = {}
    for path, (name, axes) in stored.items():
        value = found.pop(name)  # so that a tensor and its transpose are in memory for a moment only
        params[path] = value if axes is None else value.transpose(axes)
    return traverse_util.unflatten_dict(params)


def save_params(
    params: Params,
    directory: Path | str,
    stored: StoredMap,
    hf_config: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write ``params`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    tensors = {}
    for path, value in traverse_util.flatten_dict(params).items():
        name, axes = stored[path]
        tensors[name] = nnx.Param(value if axes is None else value.transpose(np.argsort(axes)))
    names = {(name,): checkpoint.Tensor(name) for name in tensors}
    checkpoint.save_model(nnx.Dict(tensors), directory, names, hf_config, dtype=dtype, max_file_bytes=max_file_bytes)
