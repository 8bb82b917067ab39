"""From a jaxpr to an op graph: `lower`. One file a family of primitives; importing it registers its rules."""

from jax_mpk.frontend import (  # noqa: F401
    arithmetic,
    contraction,
    control,
    convert,
    convolution,
    cumulative,
    fold,
    memory,
    ragged,
    random,
    reduction,
    shape,
    sorting,
    special,
    window,
)
from jax_mpk.frontend.jaxpr import gaps, lower

__all__ = ["gaps", "lower"]
