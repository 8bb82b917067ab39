"""A differential fuzzer: random functions, as megakernels and through `jax.jit`, until a result differs.

    python -m tests.fuzz SEED COUNT [--implementation cpu|cuda] [--arch sm_80] [--jobs N]

`case` is a random function as text, `grow` makes one from a seed, `run` executes it both ways, `judge` compares, `wide`
is the float64 reference that decides when floats differ, `shrink` finds the smallest function that still fails.
"""
