"""The selective state space: one step, and the same for many positions by matrix products within chunks.

A head has a state of ``[head_dim, state_size]``. At each position it decays by ``exp(step * rate)``, with one ``step`` for
the position and one ``rate`` for the head, both times the head's; ``step * x`` enters it along ``into``, and what leaves it is
read along ``out``. Everything here is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def one_step(
    state: jax.Array, x: jax.Array, step: jax.Array, rate: jax.Array, into: jax.Array, out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Advance by one position.

    Args:
      state: ``[B, H, P, N]``.
      x: ``[B, H, P]``.
      step: ``[B, H]``, not negative.
      rate: ``[H]``, negative.
      into, out: ``[B, G, N]``; heads ``h`` with the same ``h // (H / G)`` share a group.

    Returns:
      ``[B, H, P]``, and the new state.
    """
    into, out = (jnp.repeat(part, x.shape[1] // part.shape[1], axis=1) for part in (into, out))
    decay = jnp.exp(step * rate)[:, :, None, None]
    state = decay * state + (step[:, :, None] * x)[:, :, :, None] * into[:, :, None, :]
    return jnp.sum(state * out[:, :, None, :], axis=-1), state


def many_steps(
    state: jax.Array, x: jax.Array, step: jax.Array, rate: jax.Array, into: jax.Array, out: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Advance by ``T`` positions, ``chunk`` at a time; arguments and results as of ``one_step``, with ``T`` as second axis."""
    length = x.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk

    def chunks(part: jax.Array) -> jax.Array:
        # A step of zero decays nothing and lets nothing enter, so that what follows the last position changes no state.
        part = jnp.pad(part, ((0, 0), (0, padding)) + ((0, 0),) * (part.ndim - 2))
        return part.reshape(part.shape[0], -1, chunk, *part.shape[2:]).swapaxes(0, 1)

    def body(state: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        y, state = _chunk(state, *parts[:2], rate, *parts[2:])
        return state, y

    if length == chunk:
        return _chunk(state, x, step, rate, into, out)
    state, y = lax.scan(body, state, tuple(map(chunks, (x, step, into, out))))
    y = y.swapaxes(0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], state


def _chunk(
    state: jax.Array, x: jax.Array, step: jax.Array, rate: jax.Array, into: jax.Array, out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All positions of a chunk at once.

    The state before the chunk reaches position ``t`` times ``exp(total[t])``; what enters at ``s`` reaches ``t >= s`` times
    ``exp(total[t] - total[s])``, where ``total`` sums ``step * rate`` up to a position.
    """
    batch, length, heads, _ = x.shape
    total = jnp.cumsum(step * rate, axis=1)  # [B, T, H]
    earlier = jnp.tril(jnp.ones((length, length), bool))[:, :, None]
    # Masked before the exponential: after it, what is later could be infinite, and infinity times zero is no number.
    reach = jnp.exp(jnp.where(earlier, total[:, :, None] - total[:, None], -jnp.inf))  # [B, T, S, H]
    entering = step[..., None] * x

    share = heads // into.shape[2]
    meets = jnp.repeat(jnp.einsum("btgn,bsgn->btsg", out, into), share, axis=3)
    y = jnp.einsum("btsh,bshp->bthp", reach * meets, entering)
    into, out = (jnp.repeat(part, share, axis=2) for part in (into, out))
    y = y + jnp.exp(total)[..., None] * jnp.einsum("bthn,bhpn->bthp", out, state)

    rest = jnp.exp(total[:, -1:] - total)[..., None]
    entered = jnp.einsum("bshp,bshn->bhpn", rest * entering, into)
    return y, jnp.exp(total[:, -1])[:, :, None, None] * state + entered
