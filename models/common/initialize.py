"""Random weights for any model, fast and without a second copy, so that large shapes can be run without a download."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.common.config import DecoderConfig

Model = TypeVar("Model", bound=nnx.Module)


class _OneKey:
    """Stands in for ``nnx.Rngs`` where no random number will be drawn.

    Under a trace, JAX takes time proportional to what has been traced so far whenever the counter of an ``nnx.Rngs``
    advances, which for a deep model adds up to seconds.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(model_class: type[Model], config: DecoderConfig, dtype: DTypeLike) -> Model:
    """A model whose parameters are ``jax.ShapeDtypeStruct``: its structure, with no memory behind it."""
    return nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=_OneKey()))


@cache
def _normal_quantiles() -> np.ndarray:
    """The 65,536 equally likely values of a standard normal, so that 16 random bits make one draw."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)


def random_leaf(path: tuple, shape: tuple[int, ...], dtype: DTypeLike, seed: int) -> np.ndarray:
    """The initial value of one parameter; depends on nothing but its arguments, on any machine.

    Norm scales are one. Matrices, also stacked ones, are normal with variance ``1 / fan_in``, which keeps activations and
    logits of order one through any depth. An embedding is as wide as its output, so there the fan-in is its last axis, as
    for biases and the offsets of norms, which are small but not zero: what leaves them out should differ.
    """
    if path[-1] == "scale":
        return np.ones(shape, dtype)
    fan_in = shape[-1] if path[-1] == "embedding" or len(shape) == 1 else shape[-2]
    table = (_normal_quantiles() / np.sqrt(fan_in)).astype(dtype)
    rng = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
    return table[rng.integers(0, 65536, shape, dtype=np.uint16)]


def random_model(
    model_class: type[Model],
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model with random weights, made leaf by leaf on the host directly in ``dtype``.

    Args:
      progress: called as ``progress(bytes done, bytes in all)`` after each parameter.
    """
    graphdef, state = nnx.split(abstract_model(model_class, config, dtype))
    leaves = nnx.to_flat_state(state)
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    filled, done = [], 0
    for path, leaf in leaves:
        value = jnp.asarray(random_leaf(path, leaf.shape, leaf.dtype, seed))
        filled.append((path, leaf.replace(value)))
        done += value.nbytes
        if progress is not None:
            progress(done, total)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def num_bytes(model: nnx.Module) -> int:
    """Bytes that the parameters take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
