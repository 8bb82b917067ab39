"""Reading and writing Hugging Face safetensors checkpoints, one file or several with an index.

Families describe their tensors by a ``TensorMap``; nothing here knows a tensor's name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.common import limits
from models.common.config import DecoderConfig
from models.common.errors import CheckpointError, ConfigError
from models.common.fields import plain, shown
from models.common.files import FileError, open_regular, parse_object, read_exactly, read_object
from models.common.initialize import abstract_model
from models.common.memory import require_memory

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOAT_TYPES = {"F32", "F16", "BF16"}

Config = TypeVar("Config", bound=DecoderConfig)
Model = TypeVar("Model", bound=nnx.Module)


class Tensor(NamedTuple):
    """Where a parameter lies in a checkpoint, and whether it is stored transposed there."""

    name: str
    transpose: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a parameter is made of: itself; see ``Stacked``."""
        return (self,)

    def under(self, prefix: str) -> Tensor:
        """The same tensor under a name that begins with ``prefix``."""
        return self._replace(name=prefix + self.name)

    def without(self, prefix: str) -> Tensor:
        """The same tensor under a name that does not begin with ``prefix``."""
        return self._replace(name=self.name.removeprefix(prefix))


class Stacked(NamedTuple):
    """Where a parameter lies whose first axis runs over several tensors: the experts of a layer."""

    tensors: tuple[Tensor, ...]

    def under(self, prefix: str) -> Stacked:
        """The same tensors under names that begin with ``prefix``."""
        return Stacked(tuple(tensor.under(prefix) for tensor in self.tensors))

    def without(self, prefix: str) -> Stacked:
        """The same tensors under names that do not begin with ``prefix``."""
        return Stacked(tuple(tensor.without(prefix) for tensor in self.tensors))


_PLAIN_NAME = re.compile(r"[^/\\:\0]+\.safetensors")

TensorMap = Mapping[tuple, Tensor | Stacked]
"""Path of a parameter in the ``nnx.State`` to its tensor, or its tensors."""


def read_config(directory: Path | str) -> dict[str, Any]:
    """The object in the ``config.json`` of a checkpoint directory; ``CheckpointError`` if it is absent or not JSON."""
    return _read(Path(directory), CONFIG)


def load_config(config_class: type[Config], directory: Path | str) -> Config:
    """The configuration in a checkpoint directory.

    Raises:
      CheckpointError: ``config.json`` is absent or not JSON.
      ConfigError: it describes something that is not supported.
    """
    return config_class.from_hf(read_config(directory), where=Path(directory) / CONFIG)


def load_model(
    model_class: type[Model],
    config: DecoderConfig,
    directory: Path | str,
    tensor_map: TensorMap,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    ignore: Iterable[str] = (),
    optional_prefix: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a checkpoint into a new model.

    Files are memory-mapped, and tensors are read, converted to ``dtype`` and put on the default device one at a time.

    Args:
      directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.
      dtype: of the parameters and of the model's activations.
      ignore: tensors that may be there and are not used.
      optional_prefix: what names in ``tensor_map`` and ``ignore`` begin with, unless no name in the checkpoint does.
      progress: called as ``progress(bytes done, bytes in all)`` after each parameter.

    Raises:
      CheckpointError: before any tensor is read, if anything at all does not fit.
      ConfigError: the parameters do not fit in the device's memory.
    """
    directory = Path(directory)
    with contextlib.ExitStack() as stack:
        tensors, ignore = _open(directory, stack), set(ignore)
        if not any(name.startswith(optional_prefix) for name in tensors):
            tensor_map = {path: tensor.without(optional_prefix) for path, tensor in tensor_map.items()}
            ignore = {name.removeprefix(optional_prefix) for name in ignore}
        _check(directory, _shapes(model_class, config, dtype, tensor_map), tensor_map, tensors, ignore)
        graphdef, state = nnx.split(abstract_model(model_class, config, dtype))
        leaves = dict(nnx.to_flat_state(state))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        require_memory(total, f"the model in {plain(directory)}, as {jnp.dtype(dtype).name},", ConfigError)
        filled, done = [], 0
        for path, leaf in leaves.items():
            value = _parameter(tensors, tensor_map[path], dtype)
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

    An earlier ``model.safetensors`` or index in the directory is replaced or removed, so that what is saved is what loads.

    Args:
      dtype: to store; that of each parameter unless given.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files, size = [{}], 0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(leaf[...] if dtype is None else leaf[...].astype(dtype))
        place = tensor_map[path]
        for tensor, part in zip(place.tensors, value if isinstance(place, Stacked) else [value], strict=True):
            part = np.ascontiguousarray(part.T if tensor.transpose else part)
            if size and size + part.nbytes > max_file_bytes:
                files.append({})
                size = 0
            files[-1][tensor.name] = part
            size += part.nbytes
    hf_config = dict(hf_config) | {"torch_dtype": str(value.dtype)}
    (directory / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n")
    metadata = {"format": "pt"}  # what other readers of Hugging Face checkpoints insist on
    if len(files) == 1:
        save_file(files[0], directory / SINGLE, metadata)
        (directory / INDEX).unlink(missing_ok=True)
        return
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, directory / name, metadata)
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(value.nbytes for tensors in files for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (directory / SINGLE).unlink(missing_ok=True)


def _read(directory: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(directory / name)
    except FileError as error:
        raise CheckpointError(directory, corrupt=[f"{name} ({error})"]) from error


def tensor_names(directory: Path | str) -> set[str]:
    """The names of the tensors of a checkpoint directory. Raises `CheckpointError` for files that are none."""
    with contextlib.ExitStack() as stack:
        return set(_open(Path(directory), stack))


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Each tensor name to the open file that holds it."""
    weight_map = _weight_map(directory)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, Any] = {}
    holder: dict[str, str] = {}
    corrupt = []
    for name in names:
        path = directory / name
        try:
            _check_header(path)
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (FileError, OSError, SafetensorError) as error:
            corrupt.append(f"{plain(name)} ({error})")
            continue
        for tensor in file.keys():  # noqa: SIM118 (not a dict)
            if tensor in holder:
                corrupt.append(f"{plain(name)} ({plain(tensor)} is in {plain(holder[tensor])} too)")
            tensors[tensor], holder[tensor] = file, name
    if not corrupt and weight_map is not None and weight_map != holder:
        for tensor in sorted(weight_map.keys() | holder.keys()):
            said, found = (plain(where.get(tensor, "no file")) for where in (weight_map, holder))
            if said != found:
                corrupt.append(f"{INDEX} ({plain(tensor)} is said to be in {said}, and is in {found})")
    if corrupt:
        raise CheckpointError(directory, corrupt=corrupt)
    return tensors


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Each tensor name to the name of its file, as the index says; None if there is no index.

    The files are those of this directory: an index comes with the weights, and must not lead anywhere else.
    """
    if not os.path.lexists(directory / INDEX):
        return None
    weight_map = _read(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "missing" if weight_map is None else shown(weight_map)
        complaint = f"'weight_map' is {found}, expected an object of tensor names and file names"
        raise CheckpointError(directory, corrupt=[f"{INDEX} ({complaint})"])
    corrupt = [
        f"{INDEX} ({plain(tensor)} is in {shown(file)}, expected the plain name of a .safetensors file beside the index)"
        for tensor, file in weight_map.items()
        if not (isinstance(file, str) and _PLAIN_NAME.fullmatch(file))
    ]
    if not corrupt and SINGLE not in weight_map.values() and os.path.lexists(directory / SINGLE):
        corrupt.append(f"{SINGLE} (it is not one of the files of {INDEX}, expected one of the two)")
    if corrupt:
        raise CheckpointError(directory, corrupt=corrupt)
    return weight_map


def _check_header(path: Path) -> None:
    """Raise ``FileError`` for what ``safe_open`` would wait for or accept: no regular file, a name twice in the header."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(read_exactly(file, 8), "little")
        if length > min(size - 8, limits.JSON_BYTES):
            raise FileError(f"its header would have {length:,} bytes, and the file has {size:,}")
        parse_object(read_exactly(file, length))


def _parameter(tensors: Mapping[str, Any], place: Tensor | Stacked, dtype: DTypeLike) -> jax.Array:
    """Read a parameter, one tensor at a time."""
    if isinstance(place, Tensor):
        value = jnp.asarray(tensors[place.name].get_tensor(place.name), dtype)
        return value.T if place.transpose else value
    value = None
    for index, tensor in enumerate(place.tensors):
        part = tensors[tensor.name].get_tensor(tensor.name)
        part = part.T if tensor.transpose else part
        if value is None:
            value = np.empty((len(place.tensors), *part.shape), dtype)
        value[index] = part
    return jnp.asarray(value)


def _part_shape(shape: tuple[int, ...], place: Tensor | Stacked) -> tuple[int, ...]:
    """The shape of each tensor of a parameter."""
    return shape[1:] if isinstance(place, Stacked) else shape


def _shapes(
    model_class: type[Model], config: DecoderConfig, dtype: DTypeLike, tensor_map: TensorMap
) -> dict[tuple, tuple[int, ...]]:
    """The shape of each parameter, from a model of one layer: all are alike, and many take seconds to describe."""
    state = nnx.state(abstract_model(model_class, config.replace(num_layers=1), dtype))
    first = {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    return {path: first[("layers", 0, *path[2:]) if path[0] == "layers" else path] for path in tensor_map}


def _check(
    directory: Path,
    shapes: Mapping[tuple, tuple[int, ...]],
    tensor_map: TensorMap,
    tensors: Mapping[str, Any],
    ignore: set[str],
) -> None:
    misshapen = []
    places = [
        (tensor, _part_shape(shapes[path], place)) for path, place in tensor_map.items() for tensor in place.tensors
    ]
    for tensor, shape in places:
        if tensor.name not in tensors:
            continue
        found = tensors[tensor.name].get_slice(tensor.name)
        expected = list(shape[::-1] if tensor.transpose else shape)
        if found.get_shape() != expected:
            misshapen.append(f"{tensor.name} (found {found.get_shape()}, expected {expected})")
        elif found.get_dtype() not in FLOAT_TYPES:
            misshapen.append(f"{tensor.name} (stored as {found.get_dtype()}, expected one of {sorted(FLOAT_TYPES)})")
    wanted = {tensor.name for tensor, _ in places}
    missing = sorted(wanted - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted - ignore)
    if missing or unexpected or misshapen:
        raise CheckpointError(directory, missing=missing, unexpected=unexpected, misshapen=misshapen)
