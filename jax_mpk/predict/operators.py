"""The pieces of a function's megakernel: from memory, from disk, or from the first passes of the compiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jax_mpk import compiler
from jax_mpk.cache import Disk, Memory
from jax_mpk.device import Device
from jax_mpk.options import Options
from jax_mpk.predict import work
from jax_mpk.predict.piece import Piece, dump, parse

SUFFIX, BYTES = ".work", 1 << 26
"""Of the files, and how much of the disk they may take."""
_memory: Memory[tuple[Piece, ...]] = Memory()


def operators(jaxpr: Any, target: Device, options: Options, *, name: str = "fn") -> tuple[Piece, ...]:
    """One piece an operator. Where passes run for it, `compiler.program` goes on from their results. Raises like
    `compiler.compile`."""
    key = compiler.key_of(jaxpr, target, options, name) if compiler.may_reuse(options) else b""
    path = options.cache_path()
    disk = Disk(path, BYTES, SUFFIX, lambda key, data: _parsed(key, data) is not None) if path and key else None
    found = _memory.get(key) if key else None
    if found is None and disk:
        found = _parsed(key, disk.get(key) or b"")
    if found is None:
        compiled = compiler.compile(jaxpr, target, replace(options, stop_after=""), name=name, last=compiler.GRAPH)
        found = work.pieces(compiled.stages[compiler.GRAPH], target)
        if disk:
            disk.put(key, key + dump(found))
    if key and options.cache_entries:
        _memory.put(key, found, options.cache_entries)
    return found


def clear() -> None:
    """Forgets what is in memory."""
    _memory.clear()


def _parsed(key: bytes, data: bytes) -> tuple[Piece, ...] | None:
    """The pieces in a file of this key, or None."""
    try:
        return parse(data[len(key) :]) if data.startswith(key) else None
    except ValueError:
        return None
