"""A zoo model on the GPU as it stands: the megakernel against `jax.jit` of the same function, errors and times.

Random weights, greedy decoding at a given context. Prints one line a batch size; needs a GPU and the extension module.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import jax_mpk  # noqa: E402
from jax_mpk.backends import cuda  # noqa: E402
from models.common.cache import init_cache  # noqa: E402
from models.common.initialize import abstract_model  # noqa: E402
from models.decode import greedy_step  # noqa: E402
from models.llama.config import LlamaConfig  # noqa: E402
from models.llama.model import Llama  # noqa: E402
from models.qwen3.config import Qwen3Config  # noqa: E402
from models.qwen3.model import Qwen3  # noqa: E402


def median(f, n: int = 5) -> float:
    times = []
    for _ in range(n):
        t = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - t)
    return float(np.median(times)) * 1e3


def main() -> None:
    a = argparse.ArgumentParser()
    a.add_argument("--model", default="llama_3_2_1b")
    a.add_argument("--batch", type=int, nargs="+", default=[1])
    a.add_argument("--context", type=int, default=1024)
    a.add_argument("--steps", type=int, default=32)
    a = a.parse_args()
    kind, config_class = (Llama, LlamaConfig) if a.model.startswith("llama") else (Qwen3, Qwen3Config)
    config = getattr(config_class, a.model)()
    graphdef, abstract = nnx.split(abstract_model(kind, config, jnp.bfloat16))
    leaves, treedef = jax.tree.flatten(abstract)
    key = jax.random.key(0)

    def leaf(n, x):
        r = jax.random.normal(jax.random.fold_in(key, n), x.shape, jnp.float32)
        return (
            1 + 0.1 * r if len(x.shape) == 1 else r / max(x.shape[0] if x.shape[0] < 20000 else x.shape[-1], 1) ** 0.5
        ).astype(x.dtype)

    leaves = [jax.jit(lambda n=n, x=x: leaf(n, x))() for n, x in enumerate(leaves)]
    nbytes = sum(x.nbytes for x in leaves)

    def step(leaves, token, cache, pos):
        return greedy_step(graphdef, jax.tree.unflatten(treedef, leaves), token, cache, pos)

    def loop(f):
        def run(leaves, token, cache, pos):
            def body(_, carry):
                token, cache, pos = carry
                token, _, cache = f(leaves, token, cache, pos)
                return token, cache, pos + 1

            return jax.lax.fori_loop(0, a.steps, body, (token, cache, pos))

        return jax.jit(run)

    graphdef32, abstract32 = nnx.split(abstract_model(kind, config, jnp.float32))
    treedef32 = jax.tree.structure(abstract32)

    def reference(leaves, token, cache, pos):
        wide = [x.astype(jnp.float32) for x in leaves]
        return greedy_step(
            graphdef32,
            jax.tree.unflatten(treedef32, wide),
            token,
            jax.tree.map(lambda x: x.astype(jnp.float32), cache),
            pos,
        )

    mega = jax_mpk.megakernelize(step, implementation="cuda")
    for batch in a.batch:
        cache = init_cache(config, batch, a.context)
        cache = jax.tree.map(lambda x: jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype), cache)
        token, pos = jnp.arange(batch, dtype=jnp.int32) + 17, jnp.int32(a.context - a.steps - 2)
        t = time.perf_counter()
        compiled = jax.jit(mega).lower(leaves, token, cache, pos).compile()
        seconds = time.perf_counter() - t
        want, got = jax.jit(step)(leaves, token, cache, pos), compiled(leaves, token, cache, pos)
        jax.block_until_ready(got)
        cuda.check()
        exact = np.asarray(jax.jit(reference)(leaves, token, cache, pos)[1])
        error = [float(np.linalg.norm(np.asarray(x[1]) - exact) / np.linalg.norm(exact)) for x in (want, got)]
        print(
            f"{a.model} batch {batch}: lower and compile {seconds:.1f} s; error against f32: jax.jit {error[0]:.2e}, megakernel "
            f"{error[1]:.2e}, ratio {error[1] / error[0]:.3f}; tokens equal {bool((want[0] == got[0]).all())}",
            flush=True,
        )
        jit_loop, mega_loop = loop(step), loop(mega)
        for name, f in (("jax.jit", jit_loop), ("megakernel", mega_loop)):
            jax.block_until_ready(f(leaves, token, cache, pos))
            ms = median(lambda f=f: f(leaves, token, cache, pos)) / a.steps
            print(
                f"{a.model} batch {batch} {name:10s} {ms:.4f} ms/step, {nbytes / ms / 1e6:.0f} GB/s of weights",
                flush=True,
            )


if __name__ == "__main__":
    main()
