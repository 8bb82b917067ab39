"""What is benchmarked: the zoo's own decode step, alone and in a loop, and the state that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from models.common.cache import Cache
from models.common.decoder import Decoder
from models.common.initialize import abstract_model
from models.decode import greedy_step

Step = Callable[..., tuple[jax.Array, jax.Array, Cache]]
"""``step(state, token, cache, pos)`` returns (token, logits, cache)."""

Wrapper = Callable[[Step], Step]


def plain(step: Step) -> Step:
    """The wrapper that does nothing: ``jax.jit`` of the function as it is."""
    return step


@dataclass(frozen=True)
class Subject:
    """A model as the benchmark runs it: the step as the zoo writes it, and the weights as operands.

    ``leaves`` and ``treedef`` are the model's state, flattened once, because a call with an ``nnx.State`` costs more.
    """

    model: Decoder
    step: Step
    leaves: list[jax.Array]
    treedef: Any
    compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict, compare=False, repr=False)

    def compile_step(self, wrap: Wrapper, token: jax.Array, cache: Cache) -> Callable[..., Any]:
        """``run(leaves, token, cache, pos)`` for one step, compiled once; the cache is donated."""
        key = wrap, cache[0]["k"].shape
        if key not in self.compiled:
            self.compiled[key] = self._compile(wrap(self.step), token, cache)
        return self.compiled[key]

    def compile_loop(self, wrap: Wrapper, steps: int, token: jax.Array, cache: Cache) -> Callable[..., Any]:
        """``run(leaves, token, cache, pos)`` for ``steps`` wrapped steps in a loop inside one jit; as above.

        Returns the last token, the cache and the position after it.
        """
        step = wrap(self.step)

        def loop(state: Any, token: jax.Array, cache: Cache, pos: jax.Array) -> tuple[jax.Array, Cache, jax.Array]:
            def body(_: jax.Array, carry: tuple) -> tuple:
                token, cache, pos = carry
                token, _, cache = step(state, token, cache, pos)
                return token, cache, pos + 1

            return lax.fori_loop(0, steps, body, (token, cache, pos))

        return self._compile(loop, token, cache)

    def _compile(self, fn: Callable[..., Any], token: jax.Array, cache: Cache) -> Callable[..., Any]:
        def flat(leaves: list[jax.Array], token: jax.Array, cache: Cache, pos: jax.Array) -> Any:
            return fn(jax.tree.unflatten(self.treedef, leaves), token, cache, pos)

        return jax.jit(flat, donate_argnums=2).lower(self.leaves, token, cache, np.int32(0)).compile()


def subject(model: Decoder) -> Subject:
    """The subject of a model with weights."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    return Subject(model, partial(greedy_step, graphdef), leaves, treedef)


def upcast(model: Decoder, device: jax.Device | None = None) -> Subject:
    """The same model with the same weights in float32, on ``device`` if given: the reference of the gate."""
    graphdef, abstract = nnx.split(abstract_model(type(model), model.config, jnp.float32))
    leaves = jax.tree.leaves(nnx.state(model))
    leaves = [jax.device_put(leaf, device).astype(jnp.float32) for leaf in leaves]
    treedef = jax.tree.structure(abstract)
    merged = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    return Subject(merged, partial(greedy_step, graphdef), leaves, treedef)


def start(model: Decoder, batch: int, slots: int) -> tuple[jax.Array, Cache]:
    """A first token for every row, and a cache full of normal random values: attention has something to attend to."""
    token = (7919 * (1 + jnp.arange(batch, dtype=jnp.int32))) % model.config.vocab_size
    shapes = jax.eval_shape(lambda: model.init_cache(batch, slots))
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    filled = [_normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return token, jax.tree.unflatten(treedef, filled)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def choose(implementation: str) -> Wrapper:
    """The wrapper of a named implementation; "jit" is plain ``jax.jit`` again, which shows the noise of the harness.

    Raises ``ImportError`` where jax_mpk cannot be imported.
    """
    if implementation == "jit":
        return plain
    from jax_mpk import megakernelize

    return partial(megakernelize, implementation=implementation)
