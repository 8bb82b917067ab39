"""Files of a directory that somebody else made: only regular ones, of a bounded size, and JSON without ambiguity.

Links are followed, wherever they lead: caches of checkpoints consist of them, and whoever made the directory made the link.
What a link leads to must be a regular file like any other.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from models.common import limits
from models.common.fields import plain, shown


class FileError(ValueError):
    """Why a file cannot be used. The message does not name the file: the caller knows what it is for."""


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened for reading; raises ``FileError`` for whatever is not a regular file, and never blocks."""
    try:
        # Asked before opening, which for a device may already be an action, and once more of what was opened.
        _check_regular(os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            _check_regular(os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "there is no such file" if _is_directory(path.parent) else f"there is no directory {plain(path.parent)}"
        raise FileError(what) from error
    except OSError as error:
        raise FileError(error.strerror or str(error)) from error
    except ValueError as error:  # no name that a file can have
        raise FileError("no file can have this name") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of ``path``; raises ``FileError`` if it is larger than ``limit`` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FileError(f"it has {size:,} bytes, expected at most {limit:,}")
        return read_exactly(file, size)


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """The next ``size`` bytes; raises ``FileError`` if they are not there."""
    try:
        content = file.read(size) or b""
    except OSError as error:
        raise FileError(error.strerror or str(error)) from error
    if len(content) != size:
        raise FileError(f"it ends after {len(content):,} of {size:,} bytes")
    return content


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in ``content``; raises ``FileError`` unless it is strictly JSON, in UTF-8, with no name twice."""
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except FileError:
        raise
    except UnicodeDecodeError as error:
        raise FileError(f"not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from error
    except RecursionError as error:
        raise FileError("not usable: nested too deeply") from error
    except ValueError as error:
        raise FileError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"expected a JSON object, found {shown(value)}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``; see ``parse_object`` and ``read_bytes``."""
    return parse_object(read_bytes(path, limits.JSON_BYTES))


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds: dict[str, Callable[[int], bool]] = {"directory": stat.S_ISDIR, "FIFO": stat.S_ISFIFO}
        kind = next((name for name, test in kinds.items() if test(mode)), "device or socket")
        raise FileError(f"expected a regular file, found a {kind}")


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise FileError(f"the name {shown(twice)} is there twice")
    return result


def _constant(name: str) -> Any:
    raise FileError(f"not JSON: {name} is no number of JSON")
