"""Reading and writing Hugging Face safetensors checkpoints, one file or several with an index.

Families describe their tensors by a ``TensorMap``; nothing here knows a tensor's name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.common.config import DecoderConfig
from models.common.initialize import abstract_model

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOAT_TYPES = {"F32", "F16", "BF16"}

Model = TypeVar("Model", bound=nnx.Module)


class Tensor(NamedTuple):
    """Where a parameter lies in a checkpoint, and whether it is stored transposed there."""

    name: str
    transpose: bool = False


TensorMap = Mapping[tuple, Tensor]
"""Path of a parameter in the ``nnx.State`` to its tensor."""


class CheckpointError(ValueError):
    """A checkpoint does not fit the model.

    Everything found wrong is collected first, so one error lists all of it.

    Attributes:
      missing: tensors that the model needs and the checkpoint lacks.
      unexpected: tensors that the checkpoint has and the model does not know.
      misshapen: tensors of the wrong shape or an unsupported type, each with what was found and expected.
      corrupt: files that are absent, truncated or not safetensors, each with the reason.
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
        lines = [f"cannot load the checkpoint {where}"]
        for kind in ("corrupt", "missing", "unexpected", "misshapen"):
            found = getattr(self, kind)
            if found:
                more = f", and {len(found) - 8} more" if len(found) > 8 else ""
                lines.append(f"  {len(found)} {kind}: {', '.join(found[:8])}{more}")
        super().__init__("\n".join(lines))


def read_config(directory: Path | str) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint directory; raises ``CheckpointError`` if it is absent or not JSON."""
    return _read_json(Path(directory), CONFIG)


def load_model(
    model_class: type[Model],
    config: DecoderConfig,
    directory: Path | str,
    tensor_map: TensorMap,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    ignore: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a checkpoint into a new model.

    Files are memory-mapped, and tensors are read, converted to ``dtype`` and put on the default device one at a time.

    Args:
      directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.
      dtype: of the parameters and of the model's activations.
      ignore: tensors that may be there and are not used.
      progress: called as ``progress(bytes done, bytes in all)`` after each parameter.

    Raises:
      CheckpointError: before any tensor is read, if anything at all does not fit.
    """
    directory = Path(directory)
    graphdef, state = nnx.split(abstract_model(model_class, config, dtype))
    leaves = dict(nnx.to_flat_state(state))
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, stack)
        _check(directory, leaves, tensor_map, tensors, set(ignore))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        filled, done = [], 0
        for path, leaf in leaves.items():
            tensor = tensor_map[path]
            value = jnp.asarray(tensors[tensor.name].get_tensor(tensor.name), dtype)
            value = value.T if tensor.transpose else value
            filled.append((path, leaf.replace(value)))
            done += value.nbytes
            if progress is not None:
                progress(done, total)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def save_model(
    model: nnx.Module,
    directory: Path | str,
    tensor_map: TensorMap,
    hf_config: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write ``model`` as a checkpoint, in several files with an index if one would exceed ``max_file_bytes``.

    Args:
      dtype: to store; that of each parameter unless given.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files, size = [{}], 0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(leaf[...] if dtype is None else leaf[...].astype(dtype))
        tensor = tensor_map[path]
        value = np.ascontiguousarray(value.T if tensor.transpose else value)
        if size and size + value.nbytes > max_file_bytes:
            files.append({})
            size = 0
        files[-1][tensor.name] = value
        size += value.nbytes
    hf_config = dict(hf_config) | {"torch_dtype": str(value.dtype)}
    (directory / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n")
    metadata = {"format": "pt"}  # what other readers of Hugging Face checkpoints insist on
    if len(files) == 1:
        save_file(files[0], directory / SINGLE, metadata)
        return
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, directory / name, metadata)
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(value.nbytes for tensors in files for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _read_json(directory: Path, name: str) -> Any:
    try:
        return json.loads((directory / name).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(directory, corrupt=[f"{name} ({error})"]) from error


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Each tensor name to the open file that holds it."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory, INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(directory, corrupt=[f"{INDEX} (no 'weight_map')"])
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE]
    files, corrupt = [], []
    for name in names:
        try:
            files.append(stack.enter_context(safe_open(directory / name, framework="numpy")))
        except (OSError, SafetensorError) as error:
            corrupt.append(f"{name} ({error})")
    if corrupt:
        raise CheckpointError(directory, corrupt=corrupt)
    # The files themselves, not the index, say what they hold.
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)


def _check(
    directory: Path, leaves: Mapping[tuple, Any], tensor_map: TensorMap, tensors: Mapping[str, Any], ignore: set[str]
) -> None:
    wanted = {tensor_map[path].name for path in leaves}
    misshapen = []
    for path, leaf in leaves.items():
        tensor = tensor_map[path]
        if tensor.name not in tensors:
            continue
        found = tensors[tensor.name].get_slice(tensor.name)
        expected = list(leaf.shape[::-1] if tensor.transpose else leaf.shape)
        if found.get_shape() != expected:
            misshapen.append(f"{tensor.name} (found {found.get_shape()}, expected {expected})")
        elif found.get_dtype() not in FLOAT_TYPES:
            misshapen.append(f"{tensor.name} (stored as {found.get_dtype()}, expected one of {sorted(FLOAT_TYPES)})")
    missing = sorted(wanted - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted - ignore)
    if missing or unexpected or misshapen:
        raise CheckpointError(directory, missing=missing, unexpected=unexpected, misshapen=misshapen)
