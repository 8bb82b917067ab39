"""Directories with something wrong in them, made without any code under test."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def unblocked(directory: Path) -> Iterator[None]:
    """Whoever waits for a FIFO of ``directory`` is sent on after some seconds, to fail the test instead of stopping it."""

    def send_on() -> None:
        for path in directory.iterdir():
            if path.is_fifo():
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    timer = threading.Timer(10, send_on)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
