"""From a jaxpr to an op graph: `lower`."""

from jax_mpk.frontend.lower import lower

__all__ = ["lower"]
