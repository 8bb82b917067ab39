import jax, jax.numpy as jnp, numpy as np, jax_mpk
r = np.random.default_rng(1)
bad = 0
for shape, k in (((1, 128256), 50), ((4, 128256), 50), ((2, 151936), 8), ((3, 50257), 200), ((16, 32000), 40)):
    for kind in ("normal", "ties"):
        for dt in (jnp.float32, jnp.bfloat16):
            x = r.standard_normal(shape).astype(np.float32)
            if kind == "ties": x = np.round(x * 2) / 2; x[0, 5] = np.nan; x[0, -1] = np.nan; x[:, ::3] = -np.inf
            x = jnp.asarray(x, dt)
            a = jax.jit(jax_mpk.megakernelize(lambda x: jax.lax.top_k(x, k), implementation="cuda"))(x)
            with jax.default_device(jax.devices("cpu")[0]): b = jax.lax.top_k(jax.device_put(x, jax.devices("cpu")[0]), k)
            ok = all(np.array_equal(np.asarray(p, np.float32), np.asarray(q, np.float32), equal_nan=True) for p, q in zip(a, b))
            bad += not ok; print(shape, k, kind, dt.__name__, ok, flush=True)
print("BAD" if bad else "ALL EQUAL")
