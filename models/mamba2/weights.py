"""Hugging Face checkpoints of Mamba-2."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from models.common import checkpoint, limits, linen
from models.common.errors import CheckpointError
from models.common.files import FileError, parse_object, read_bytes
from models.common.linen import LINEAR, Stored
from models.mamba2.config import Mamba2Config
from models.mamba2.model import Mamba2, init_cache

_CONV = (2, 1, 0)  # stored as [features, 1, size], kept as [size, 1, features]
_BARE_INFINITY = re.compile(rb'("time_step_limit"\s*:\s*\[[^\]"{]*?)\bInfinity(\s*\])')


def stored_map(config: Mamba2Config) -> linen.StoredMap:
    """Each parameter of the model to its tensor in a checkpoint."""
    stored = {
        ("embed", "embedding"): Stored("backbone.embeddings.weight"),
        ("norm", "scale"): Stored("backbone.norm_f.weight"),
    }
    if not config.tie_embeddings:
        stored[("head",)] = Stored("lm_head.weight", LINEAR)
    for index in range(config.num_layers):
        prefix, path = f"backbone.layers.{index}.", f"mixer_{index}"
        stored[f"norm_{index}", "scale"] = Stored(f"{prefix}norm.weight")
        for ours, name in (("step_bias", "dt_bias"), ("log_rate", "A_log"), ("skip", "D")):
            stored[path, ours] = Stored(f"{prefix}mixer.{name}")
        stored[path, "norm", "scale"] = Stored(f"{prefix}mixer.norm.weight")
        stored[path, "conv", "kernel"] = Stored(f"{prefix}mixer.conv1d.weight", _CONV)
        if config.use_conv_bias:
            stored[path, "conv", "bias"] = Stored(f"{prefix}mixer.conv1d.bias")
        for ours, name in (("into", "in_proj"), ("out", "out_proj")):
            stored[path, ours, "kernel"] = Stored(f"{prefix}mixer.{name}.weight", LINEAR)
            if config.use_bias:
                stored[path, ours, "bias"] = Stored(f"{prefix}mixer.{name}.bias")
    return stored


def _inputs(config: Mamba2Config) -> tuple[jax.ShapeDtypeStruct, Any]:
    """Arguments that a model can be described with: those of a step."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.eval_shape(lambda: init_cache(config, 1))


def _special(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Parameters that start as the authors let them start: steps from 0.001 to 0.1, and rates of 1, 2, 3, ..."""
    if name == "step_bias":
        steps = np.geomspace(1e-3, 0.1, *shape)
        return steps + np.log(-np.expm1(-steps))  # of which softplus is ``steps``
    if name == "log_rate":
        return np.log(np.arange(1, shape[0] + 1))
    return np.ones(shape) if name == "skip" else None


def random_model(
    config: Mamba2Config, *, dtype: DTypeLike = jnp.bfloat16, seed: int = 0
) -> tuple[Mamba2, linen.Params]:
    """A model and random parameters for it."""
    model = Mamba2(config, dtype)
    return model, linen.random_params(model, *_inputs(config), seed=seed, special=_special)


def load_config(directory: Path | str) -> Mamba2Config:
    """The configuration in a checkpoint directory; errors as of ``checkpoint.load_config``.

    Where the upper end of the steps is a bare ``Infinity``, as it was long written and as is no JSON, it is read nevertheless.
    """
    directory = Path(directory)
    try:
        content = read_bytes(directory / checkpoint.CONFIG, limits.JSON_BYTES)
        hf = parse_object(_BARE_INFINITY.sub(rb'\1{"__float__": "Infinity"}\2', content))
    except FileError as error:
        raise CheckpointError(directory, corrupt=[f"{checkpoint.CONFIG} ({error})"]) from error
    return Mamba2Config.from_hf(hf, where=directory / checkpoint.CONFIG)


def from_pretrained(
    directory: Path | str,
    *,
    config: Mamba2Config | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Mamba2, linen.Params]:
    """A model and its parameters from a checkpoint directory. ``config`` is read from its ``config.json`` unless given.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or corrupt part.
      ConfigError: ``config.json`` describes something that is not supported.
    """
    if config is None:
        config = load_config(directory)
    model = Mamba2(config, dtype)
    return model, linen.load_params(
        model,
        *_inputs(config),
        directory=directory,
        stored=stored_map(config),
        dtype=dtype,
        ignore=["lm_head.weight"] if config.tie_embeddings else [],
        progress=progress,
    )


def save_pretrained(
    model: Mamba2,
    params: linen.Params,
    directory: Path | str,
    *,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write ``params`` of ``model`` as a checkpoint directory; see ``models.common.checkpoint.save_model``."""
    config = model.config
    linen.save_params(params, directory, stored_map(config), config.to_hf(), dtype=dtype, max_file_bytes=max_file_bytes)
