"""Benchmarks: commands that print a table against ``jax.jit`` measured in the same run. See README.md."""
