"""``python -m jax_mpk``: the table of knobs."""

from jax_mpk.options import describe

print(describe())
