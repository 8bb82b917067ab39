"""How fast does a chain of streamed contractions run? Prints one line a configuration; needs a GPU.

The chain is a decoder's MLP (norm, gate and up, down, residual): two dependency hops a layer, batch 1, Llama-3.2-1B
shapes. The ceiling is a plain read of the same bytes in the same process.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests/device")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import launch  # noqa: E402
import numpy as np  # noqa: E402
import programs  # noqa: E402


def milliseconds(step, x, w, n: int) -> float:
    f = jax.jit(lambda x, *w: jax.lax.fori_loop(0, n, lambda _, v: step(v, *w)[0] * 0.5, x))
    jax.block_until_ready(f(x, *w))
    times = []
    for _ in range(5):
        t = time.perf_counter()
        jax.block_until_ready(f(x, *w))
        times.append((time.perf_counter() - t) * 1e3 / n)
    return float(np.median(times))


def main() -> None:
    a = argparse.ArgumentParser()
    a.add_argument("--d", type=int, default=2048)
    a.add_argument("--ff", type=int, default=8192)
    a.add_argument("--layers", type=int, default=16)
    a = a.parse_args()
    key = jax.random.key(0)
    shapes = [(a.d, a.ff), (a.d, a.ff), (a.ff, a.d)] * a.layers
    w = [jax.random.normal(jax.random.fold_in(key, n), s, jnp.bfloat16) / s[0] ** 0.5 for n, s in enumerate(shapes)]
    nbytes = sum(x.nbytes for x in w)
    print(
        f"{jax.local_devices()[0].device_kind}: {a.layers} layers, d {a.d}, ff {a.ff}, {nbytes / 1e9:.3f} GB of weights"
    )

    def jit_step(x, *w):
        for n in range(a.layers):
            gate, up, down = w[3 * n : 3 * n + 3]
            h = (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)
            g, u = (jnp.dot(h, m, preferred_element_type=jnp.float32) for m in (gate, up))
            x = x + jnp.dot((jax.nn.silu(g) * u).astype(jnp.bfloat16), down, preferred_element_type=jnp.float32)
        return (x,)

    for batch in (1, 8, 16):
        x = jax.random.normal(key, (batch, a.d), jnp.float32)
        ms = milliseconds(jit_step, x, w, 20)
        print(f"batch {batch:2d} jax.jit                     {ms:8.4f} ms {nbytes / ms / 1e6:6.0f} GB/s", flush=True)
        for window, ring, slices in (
            [(1, 0, 4), (2, 0, 4), (3, 0, 4), (4, 0, 4), (2, 6, 4), (2, 0, 2)] if batch == 1 else [(2, 0, 4), (3, 0, 4)]
        ):
            blob = programs.split_chain(batch, a.d, a.ff, a.layers, slices)
            step = launch.function(blob, [((batch, a.d), jnp.float32)], launch.device(window=window, ring=ring))
            ms = milliseconds(step, x, w, 20)
            want, got = np.asarray(jax.jit(jit_step)(x, *w)[0]), np.asarray(jax.jit(step)(x, *w)[0])
            wrong = np.linalg.norm(want - got) / np.linalg.norm(want)
            print(
                f"batch {batch:2d} window {window} ring {ring:2d} slices {slices} {ms:8.4f} ms {nbytes / ms / 1e6:6.0f} GB/s  error {wrong:.1e}",
                flush=True,
            )
            message = launch.extension().cuda_check()
            if message:
                print(message, flush=True)


if __name__ == "__main__":
    main()
