"""Directories with something wrong in them, made without any code under test."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def unblocked(directory: Path) -> Iterator[None]:
    """Whoever waits for a FIFO of ``directory`` is sent on after some seconds, to fail the test instead of stopping it.

    By another process: a thread would wait for the interpreter's lock if a library holds it meanwhile.
    """
    fifos = [str(path) for path in directory.iterdir() if path.is_fifo()]
    script = 'sleep 10; for fifo; do : <> "$fifo"; done'
    process = subprocess.Popen(["sh", "-c", script, "sh", *fifos]) if fifos else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def header_of(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file of float32 ``tensors``, and the data that follow it."""
    header, data = {}, b""
    for name, value in tensors.items():
        content = np.ascontiguousarray(value, np.float32).tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return header, data


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of any ``header``, JSON or bytes, which claims to be ``length`` bytes long."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data
