"""Whether something fits in the device's memory, asked before any of it is allocated."""

from __future__ import annotations

import os

import jax

from models.common.errors import ModelError


def device_memory() -> int | None:
    """Bytes of memory of the default device; for a CPU those of the machine. None if there is no way to know."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(size: int, what: str, error: type[ModelError]) -> None:
    """Raise ``error`` if ``what`` takes more than all of the device's memory: ``size`` bytes."""
    limit = device_memory()
    if limit is not None and size > limit:
        raise error(f"{what} takes {size / 1e9:,.1f} GB, but the device has {limit / 1e9:,.1f}")
