"""A decode loop inside the wrapped function against jit of the same function."""
import sys, time, statistics, json, os, warnings
import jax, jax.numpy as jnp
from flax import nnx
from functools import partial
from benchmarks.subject import start
from models import registry
from models.common.initialize import random_model
from models.decode import greedy_step
import jax_mpk
out = {}
for preset, batch in (("llama-3.2-1b", 1), ("qwen3-0.6b", 1), ("llama-3.2-1b", 4)):
    family, config = registry.preset(preset)
    model = random_model(family, config, dtype=jnp.bfloat16, seed=0)
    graphdef, state = nnx.split(model)
    step = partial(greedy_step, graphdef)
    token, cache = start(model, batch, 1000)
    def generate(state, token, cache, n):
        def more(s): return (s[0] < n) & jnp.any(s[1] >= 0)
        def body(s):
            i, token, cache, outs = s
            token, _, cache = step(state, token, cache, i + 500)
            return i + 1, token, cache, jax.lax.dynamic_update_slice(outs, token.reshape(-1, 1).astype(jnp.int32), (0, i))
        return jax.lax.while_loop(more, body, (0, token, cache, jnp.zeros((batch, 64), jnp.int32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = {"jit": jax.jit(generate), "wrapped": jax.jit(jax_mpk.megakernelize(generate))}
        low = runs["wrapped"].lower(state, token, cache, 64).as_text().count("@jax_mpk_cuda")
        t = {k: [] for k in runs}; toks = {}
        for k, f in runs.items(): toks[k] = jax.block_until_ready(f(state, token, cache, 64))[3]
        for _ in range(5):
            for k, f in runs.items():
                a = time.perf_counter(); jax.block_until_ready(f(state, token, cache, 64)); t[k].append((time.perf_counter() - a) / 64 * 1e3)
    same = int((toks["jit"] == toks["wrapped"]).sum())
    m = {k: statistics.median(v) for k, v in t.items()}
    print(preset, batch, "calls", low, {k: f"{m[k]:.3f} ({min(v):.3f}..{max(v):.3f})" for k, v in t.items()}, "ratio %.2f" % (m["jit"] / m["wrapped"]), "equal tokens", same, "of", toks["jit"].size, flush=True)
    out[f"{preset} {batch}"] = {"ms": t, "calls": low, "equal": same}
json.dump(out, open(os.environ["OUT"] + "/loop.json", "w"), indent=1)
