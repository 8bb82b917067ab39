"""Where compiled programs are kept: a small LRU in memory, and files on disk that any number of processes may share.

A file holds one entry and is named by its key. It is written beside its place and renamed, so a reader sees all of it or
nothing. Whoever reads it decides whether it is what its name says (programs and machine code carry their key and a hash);
what is not is removed and built again. Only regular files are opened, and never more is read than the cache may hold.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from jax_mpk import _compat, abi

T = TypeVar("T")
SUFFIX, NEW = ".mpk", ".new-"
STALE = 3600
"""Seconds after which a file that is still being written was left behind by a killed process."""
_OPEN = os.O_RDONLY | sum(getattr(os, f, 0) for f in ("O_CLOEXEC", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK"))


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


def is_program(key: bytes, data: bytes) -> bool:
    """Whether `data` is an undamaged program of this version that was made from what `key` says."""
    try:
        return abi.decode(data).key == key
    except (abi.ProgramError, ValueError):
        return False


_complained: set[Path] = set()


class Disk:
    """Entries in a directory, bounded in bytes: programs, or what `suffix` and `accept(key, data)` say. A directory that
    cannot be used warns once and keeps nothing."""

    def __init__(
        self, path: Path, limit: int, suffix: str = SUFFIX, accept: Callable[[bytes, bytes], bool] = is_program
    ):
        self.path, self.limit, self.suffix, self.accept = path, limit, suffix, accept

    def get(self, key: bytes) -> bytes | None:
        """The entry, or None: absent, unreadable, no file, or not acceptable under this key (the last two are removed)."""
        file = self._file(key)
        try:
            data = self._read(file)
        except OSError:
            return None
        if data is not None and self.accept(key, data):
            return data
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def put(self, key: bytes, data: bytes) -> None:
        """Keeps `data` and removes the least recently used entries beyond the bound."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path, prefix=NEW)
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(data)
                os.replace(name, self._file(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
            self._trim()
        except OSError as e:
            if self.path not in _complained:
                _complained.add(self.path)
                _compat.warn(f"compiled programs are not kept on disk: {e}")

    def _file(self, key: bytes) -> Path:
        return self.path / (key.hex() + self.suffix)

    def _read(self, file: Path) -> bytes | None:
        """The bytes of a regular file within the bound, marked as used now; None for anything else. Never waits: what
        is a pipe, a device or a link is not opened, and would not be followed or waited for if it became one just now."""
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return None
        with os.fdopen(os.open(file, _OPEN), "rb") as f:
            s = os.fstat(f.fileno())
            if not stat.S_ISREG(s.st_mode) or s.st_size > self.limit:
                return None
            with contextlib.suppress(OSError):
                os.utime(f.fileno())  # the time of last use, for `_trim`
            return f.read(s.st_size)

    def _trim(self) -> None:
        entries = []
        for entry in os.scandir(self.path):
            with contextlib.suppress(FileNotFoundError):  # another process may trim too
                s = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(s.st_mode):
                    continue
                if entry.name.endswith(self.suffix):
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
