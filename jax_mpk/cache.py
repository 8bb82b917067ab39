"""Where compiled programs are kept: a small LRU in memory, and files on disk that any number of processes may share.

A file holds one program and is named by its key. It is written beside its place and renamed, so a reader sees all of
it or nothing; what is damaged all the same (the blob carries a hash) is removed and built again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Generic, TypeVar

from jax_mpk import abi
from jax_mpk.errors import MegakernelWarning

T = TypeVar("T")
SUFFIX, NEW = ".mpk", ".new-"
STALE = 3600
"""Seconds after which a file that is still being written was left behind by a killed process."""


class Memory(Generic[T]):
    """The most recently used `T`s by key. Thread safe."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> T | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: bytes, value: T, limit: int) -> None:
        """Keeps `value`, and at most `limit` entries in all."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > limit:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


_complained: set[Path] = set()


class Disk:
    """Program blobs in a directory, bounded in bytes. A directory that cannot be used warns once and keeps nothing."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit

    def get(self, key: bytes) -> bytes | None:
        """The program, or None: absent, unreadable, of another version, or damaged (then it is removed)."""
        file = self._file(key)
        try:
            blob = file.read_bytes()
        except OSError:
            return None
        try:
            abi.decode(blob)
        except (abi.ProgramError, ValueError):
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # the time of last use, for `_trim`
        return blob

    def put(self, key: bytes, blob: bytes) -> None:
        """Keeps `blob` and removes the least recently used programs beyond the bound."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path, prefix=NEW)
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(blob)
                os.replace(name, self._file(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
            self._trim()
        except OSError as e:
            if self.path not in _complained:
                _complained.add(self.path)
                warnings.warn(f"compiled programs are not kept on disk: {e}", MegakernelWarning, stacklevel=2)

    def _file(self, key: bytes) -> Path:
        return self.path / (key.hex() + SUFFIX)

    def _trim(self) -> None:
        entries = []
        for entry in os.scandir(self.path):
            with contextlib.suppress(FileNotFoundError):  # another process may trim too
                s = entry.stat()
                if entry.name.endswith(SUFFIX):
                    entries.append((s.st_mtime_ns, s.st_size, entry.path))
                elif entry.name.startswith(NEW) and s.st_mtime < time.time() - STALE:
                    os.unlink(entry.path)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
