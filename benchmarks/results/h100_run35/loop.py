"""Decode loops inside and around the wrapped function, greedy and sampled, against jit of the same function."""
import time, statistics, json, os, warnings
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from functools import partial
from benchmarks.subject import start
from models import registry
from models.common.initialize import random_model
from models.decode import greedy_step, decode_step
import jax_mpk
warnings.simplefilter("ignore")
out, N = {}, 48
def measure(name, runs, args, tokens):
    toks = {k: np.asarray(tokens(jax.block_until_ready(f(*args)))) for k, f in runs.items()}
    t = {k: [] for k in runs}
    for _ in range(5):
        for k, f in runs.items():
            a = time.perf_counter(); jax.block_until_ready(f(*args)); t[k].append((time.perf_counter() - a) / N * 1e3)
    m = {k: statistics.median(v) for k, v in t.items()}; base = toks["jit"]
    print(name, {k: f"{m[k]:.3f} ({min(v):.3f}..{max(v):.3f})" for k, v in t.items()}, "ratio %.2f" % (m["jit"] / m["ours"]),
          "equal to jit", {k: int((v == base).sum()) for k, v in toks.items()}, "ours = steps", bool((toks["ours"] == toks.get("steps", toks["ours"])).all()), flush=True)
    out[name] = {"ms": t, "tokens": {k: v.tolist() for k, v in toks.items()}}
def subject(preset, batch):
    family, config = registry.preset(preset)
    model = random_model(family, config, dtype=jnp.bfloat16, seed=0)
    graphdef, state = nnx.split(model)
    return (graphdef, state, *start(model, batch, 1000))
for preset, batch in (("llama-3.2-1b", 1), ("qwen3-0.6b", 1)):
    graphdef, state, token, cache = subject(preset, batch)
    step = partial(greedy_step, graphdef)
    def loop(step, state, token, cache, n):
        def more(s): return (s[0] < n) & jnp.any(s[1] >= 0)
        def body(s):
            i, token, cache, outs = s
            token, _, cache = step(state, token, cache, i + 500)
            return i + 1, token, cache, jax.lax.dynamic_update_slice(outs, token.reshape(-1, 1).astype(jnp.int32), (0, i))
        return jax.lax.while_loop(more, body, (0, token, cache, jnp.zeros((batch, N), jnp.int32)))
    inside = partial(loop, step); inside.__name__ = "generate"
    ours = jax.jit(jax_mpk.megakernelize(lambda *a: loop(step, *a)))
    low = ours.lower(state, token, cache, N).as_text()
    print("megakernels in the loop", low.count("@jax_mpk_cuda"))
    runs = {"jit": jax.jit(lambda *a: loop(step, *a)), "ours": ours,
            "steps": jax.jit(partial(loop, jax_mpk.megakernelize(step, implementation="cuda")))}
    measure(f"greedy loop inside, {preset} {batch}", runs, (state, token, cache, N), lambda r: r[3])
    if preset != "llama-3.2-1b": continue
    def top_k(logits, key):
        v, i = jax.lax.top_k(logits.astype(jnp.float32) / 0.8, 50)
        return jnp.take_along_axis(i, jax.random.categorical(key, v)[:, None], 1)[:, 0].astype(jnp.int32)
    def top_p(logits, key):
        logits = logits.astype(jnp.float32) / 0.8
        order = jnp.sort(logits, -1)[:, ::-1]
        kept = jnp.sum(jnp.cumsum(jax.nn.softmax(order), -1) < 0.9, -1, keepdims=True)
        return jax.random.categorical(key, jnp.where(logits >= jnp.take_along_axis(order, kept, -1), logits, -jnp.inf)).astype(jnp.int32)
    for name, pick in (("top-k 50", top_k), ("top-p", top_p)):
        def sampled(state, token, cache, pos, key):
            logits, cache = decode_step(graphdef, state, token, cache, pos)
            return pick(logits, key), cache
        def around(step, state, token, cache):
            def body(i, s):
                token, cache = step(state, s[0], s[1], i + 500, jax.random.fold_in(jax.random.key(3), i))
                return token, cache, s[2].at[:, i].set(token)
            return jax.lax.fori_loop(0, N, body, (token, cache, jnp.zeros((batch, N), jnp.int32)))
        runs = {"jit": jax.jit(partial(around, sampled)), "ours": jax.jit(partial(around, jax_mpk.megakernelize(sampled))),
                "named": jax.jit(partial(around, jax_mpk.megakernelize(sampled, implementation="cuda")))}
        measure(f"{name}, {preset} {batch}", runs, (state, token, cache), lambda r: r[2])
json.dump(out, open(os.environ["OUT"] + "/loop.json", "w"), indent=1)
