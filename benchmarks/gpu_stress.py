"""Launches until something changes: ``python -m benchmarks.gpu_stress [CHECK ...]``, on a GPU.

Every check compares bits. `once`: three launches of two models. `small`: many launches of a small model, from Python and
in a loop on the device. `large`: a real one. `wide`: four layers of one with long rows, at batch 8 and 16. `alternate`:
two programs in turn on one stream. `streams`: two programs on two streams of one executable. `loop`: 64 tokens by a
`fori_loop` inside jit against 64 calls.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.subject import start, subject
from jax_mpk import _ext, megakernelize
from jax_mpk.backends.cuda import backend as cuda
from models import registry
from models.common.initialize import random_model

SMALL, LARGE = "qwen3-tiny", "qwen3-0.6b"
WIDE = "qwen3-8b", {"num_layers": 4, "vocab_size": 16384}
"""Rows so long that an activation does not fit in shared memory, and enough of them to keep every block busy."""


class Case:
    """One model's step at one batch, and its operands; `step` is what runs, unjitted. `changes`: to the configuration."""

    def __init__(self, name: str, batch: int, slots: int = 64, dtype: Any = jnp.bfloat16, changes: Any = None):
        model = random_model(*registry.preset(name, **(changes or {})), dtype=dtype, seed=0)
        made = subject(model)
        token, cache = start(model, batch, slots)
        self.leaves, self.state = made.leaves, (token, cache, jnp.int32(slots // 2))
        self.treedef, self.wrapped = made.treedef, megakernelize(made.step, implementation="cuda")

    def step(self, leaves: Any, state: Any) -> Any:
        return self.wrapped(jax.tree.unflatten(self.treedef, leaves), *state)


def bits(tree: Any) -> list[jax.Array]:
    """The leaves as integers, so that a NaN equals itself."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    return [lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]) for x in jax.tree.leaves(tree)]


def leaves_that_differ(a: Any, b: Any) -> jax.Array:
    """For every leaf, whether a bit of it differs: i32[leaves]."""
    return jnp.stack([jnp.any(x != y).astype(jnp.int32) for x, y in zip(bits(a), bits(b), strict=True)])


def differ(a: Any, b: Any) -> jax.Array:
    return leaves_that_differ(a, b).sum()


def repeat(case: Case, launches: int, chunk: int = 100) -> dict[str, int]:
    """For every result that ever differs from the first launch, how often, over `launches` of the same step: a tenth of
    them from Python."""
    one = jax.jit(case.step)
    want = one(case.leaves, case.state)
    count = jax.jit(leaves_that_differ)
    wrong = [count(one(case.leaves, case.state), want) for _ in range(launches // 10)]

    @jax.jit
    def many(leaves: Any, state: Any, want: Any) -> jax.Array:
        def body(_: Any, bad: jax.Array) -> jax.Array:
            state_, bad = lax.optimization_barrier((state, bad))  # a launch of every turn, not one before the loop
            return bad + leaves_that_differ(case.step(leaves, state_), want)

        return lax.fori_loop(0, chunk, body, jnp.zeros(len(jax.tree.leaves(want)), jnp.int32))

    wrong += [many(case.leaves, case.state, want) for _ in range((launches - launches // 10) // chunk)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    total = np.sum([np.asarray(x) for x in wrong], axis=0)
    return {name: int(n) for name, n in zip(names, total, strict=True) if n}


def small(args: argparse.Namespace) -> str:
    wrong = {f"batch {b}": repeat(Case(SMALL, b), args.launches, min(100, args.launches)) for b in (1, 3)}
    one = Case(SMALL, 1)
    out = jax.jit(one.step)(one.leaves, one.state)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in bits(out))).hexdigest()[:16]
    assert not any(wrong.values()), wrong
    return f"{args.launches} launches at batch 1 and 3, no bit changed; result {digest}"


def once(args: argparse.Namespace) -> str:
    """A few launches and no comparison on the device: what a sanitizer has the patience for."""
    for c in (Case(SMALL, 1), Case("llama-tiny", 3, dtype=jnp.float32)):  # attention on tensor cores and not
        one = jax.jit(c.step)
        for _ in range(3):
            jax.block_until_ready(one(c.leaves, c.state))
    return "3 launches of two models"


def large(args: argparse.Namespace) -> str:
    launches = max(10, args.launches // 10)
    wrong = repeat(Case(LARGE, 1, 1000), launches)
    assert not wrong, wrong
    return f"{launches} launches of {LARGE}, no bit changed"


def wide(args: argparse.Namespace) -> str:
    name, changes = WIDE
    launches = max(10, args.launches // 10)
    wrong = {f"batch {b}": repeat(Case(name, b, 1000, changes=changes), launches) for b in (8, 16)}
    assert not any(wrong.values()), wrong
    return f"{launches} launches of four layers of {name} at batch 8 and 16, no bit changed"


def alternate(args: argparse.Namespace) -> str:
    cases = [Case(SMALL, 1), Case(SMALL, 8, 96)]
    runs = [jax.jit(c.step) for c in cases]
    want = [f(c.leaves, c.state) for f, c in zip(runs, cases)]
    count = jax.jit(differ)
    turns = max(10, args.launches // 20)
    wrong = [count(f(c.leaves, c.state), w) for _ in range(turns) for f, c, w in zip(runs, cases, want)]
    assert not sum(map(int, wrong)), "changed"
    return f"two programs, {turns} turns each"


def streams(args: argparse.Namespace) -> str:
    """Two programs of one executable, each under a stream annotation of XLA."""
    from jax.experimental.xla_metadata import set_xla_metadata

    cases = [Case(SMALL, 1), Case(SMALL, 8, 96)]

    def on(stream: int, c: Case) -> Callable[..., Any]:
        @jax.jit
        def run(leaves: Any, state: Any) -> Any:
            return c.step(leaves, state)

        def annotated(leaves: Any, state: Any) -> Any:
            with set_xla_metadata(_xla_stream_annotation=str(stream), inlineable="false"):
                return run(leaves, state)

        return annotated

    both = jax.jit(lambda a, b: (on(1, cases[0])(*a), on(2, cases[1])(*b)))
    operands = [(c.leaves, c.state) for c in cases]
    alone = [jax.jit(c.step) for c in cases]
    want = [f(*o) for f, o in zip(alone, operands)]
    before, count = _ext.cuda_streams(), jax.jit(differ)
    turns = max(10, args.launches // 20)
    wrong = [count(both(*operands), tuple(want)) for _ in range(turns)]
    assert not sum(map(int, wrong)), "changed"
    used = _ext.cuda_streams() - before
    assert used >= 2, f"XLA put them on {used} streams of their own"
    return f"two programs on {used} streams of their own, {turns} times"


def loop(args: argparse.Namespace) -> str:
    c = Case(SMALL, 3, 128)

    def next_state(leaves: Any, state: Any) -> Any:
        token, _, cache = c.step(leaves, state)
        return token, cache, state[2] + 1

    one = jax.jit(next_state)
    state = c.state
    for _ in range(64):
        state = one(c.leaves, state)
    looped = jax.jit(lambda leaves, s: lax.fori_loop(0, 64, lambda _, x: next_state(leaves, x), s))(c.leaves, c.state)
    assert int(differ(state, looped)) == 0
    return "64 tokens in a fori_loop, equal to 64 calls in every bit"


CHECKS: dict[str, Callable[[argparse.Namespace], str]] = {
    f.__name__: f for f in (once, small, alternate, loop, streams, wide, large)
}


def attempt(name: str, args: argparse.Namespace) -> bool:
    clock = time.perf_counter()
    try:
        text, good = CHECKS[name](args), True
        cuda.check()
    except Exception as error:
        text, good = f"{type(error).__name__}: {str(error)[:600]}", False
    print(f"{'ok  ' if good else 'FAIL'} {name} ({time.perf_counter() - clock:.1f} s): {text}", flush=True)
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the status is 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stress", description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", default=[], help=f"of {', '.join(CHECKS)}; none: all")
    parser.add_argument("--launches", type=int, default=10_000, help="of the small model; the large one takes a tenth")
    args = parser.parse_args(argv)
    return 0 if all([*map(partial(attempt, args=args), args.checks or [c for c in CHECKS if c != "once"])]) else 1


if __name__ == "__main__":
    sys.exit(main())
