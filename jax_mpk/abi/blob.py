"""A program as bytes: encoded, decoded, hashed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from jax_mpk.abi.records import MAGIC, RECORDS, SECTIONS, VERSION, columns


@dataclass(frozen=True)
class Program:
    """A decoded blob: one NumPy record array a section (views, no copies)."""

    blob: bytes
    header: np.void
    sections: dict[str, np.ndarray]

    @property
    def key(self) -> bytes:
        """What the program was made from: 32 bytes, all zero for none."""
        key: bytes = self.header["key"].tobytes()
        return key

    @property
    def settings(self) -> dict[str, int]:
        """What `encode` takes beside sections and a key."""
        return {name: int(self.header[name]) for name in ("workspace", "workers", "args", "results")}

    def __getitem__(self, section: str) -> np.ndarray:
        return self.sections[section]

    def name(self, offset: int) -> str:
        """The name at a byte offset; raises `ProgramError`."""
        names = self.sections["Name"]["byte"].tobytes()
        end = names.find(b"\0", offset)
        if end < 0:
            raise ProgramError(f"the name at {offset} of {len(names)} bytes does not end")
        return names[offset:end].decode(errors="backslashreplace")


def content_hash(blob: bytes) -> bytes:
    """The hash of a blob of at least a header: of everything but the hash in it."""
    size, (_, at) = RECORDS["Header"].itemsize, columns(RECORDS["Header"])["hash"]
    digest = hashlib.sha256(blob[:at] + bytes(32) + blob[at + 32 : size])
    digest.update(memoryview(blob)[size:])
    return digest.digest()


def encode(sections: dict[str, np.ndarray], *, key: bytes = b"", **header: int) -> bytes:
    """The blob of these sections; `hash` and `bytes` of the header are filled in. `key`: 32 bytes, or none."""
    head = np.zeros((), RECORDS["Header"])
    head["magic"], head["version"] = MAGIC, VERSION
    if key:
        head["key"] = np.frombuffer(key, np.uint8)
    for name, value in header.items():
        head[name] = value
    at, chunks = head.nbytes, []
    for n, name in enumerate(SECTIONS):
        rows = np.ascontiguousarray(sections.get(name, np.zeros(0, RECORDS[name])), RECORDS[name])
        pad = -at % 64
        chunks.append(b"\0" * pad + rows.tobytes())
        head["section_offset"][n], head["section_count"][n] = at + pad, len(rows)
        at += pad + rows.nbytes
    head["bytes"] = at
    body = b"".join(chunks)
    head["hash"] = np.frombuffer(content_hash(head.tobytes() + body), np.uint8)
    return head.tobytes() + body


def with_key(blob: bytes, key: bytes) -> bytes:
    """The program with another key, and a hash that fits."""
    size = RECORDS["Header"].itemsize
    head = np.frombuffer(blob, RECORDS["Header"], 1).copy()
    head["key"], head["hash"] = np.frombuffer(key, np.uint8), 0
    head["hash"] = np.frombuffer(content_hash(head.tobytes() + blob[size:]), np.uint8)
    return head.tobytes() + blob[size:]


def structure(op: np.void) -> bytes:
    """An Op record without its bindings and names: what its codes do with its slots. Operators of equal structure (the same
    one of every layer) touch the same places of different memory."""
    op = op.copy()
    op["slot"], op["name"], op["prologue"], op["variant"] = 0, 0, 0, 0
    return op.tobytes()


class ProgramError(Exception):
    """A blob that is not a program of this version, or that is damaged."""


def decode(blob: bytes) -> Program:
    """The inverse of `encode`; raises `ProgramError` for anything else, a wrong hash included."""
    size = RECORDS["Header"].itemsize
    if len(blob) < size:
        raise ProgramError(f"a program has at least {size} bytes, this has {len(blob)}")
    head = np.frombuffer(blob, RECORDS["Header"], 1)[0]
    if head["magic"] != MAGIC or head["version"] != VERSION:
        raise ProgramError(f"not a program of version {VERSION}")
    if head["bytes"] != len(blob):
        raise ProgramError(f"the header says {head['bytes']} bytes, there are {len(blob)}")
    if content_hash(blob) != head["hash"].tobytes():
        raise ProgramError("the content does not match its hash")
    out = {}
    for n, name in enumerate(SECTIONS):
        at, count = int(head["section_offset"][n]), int(head["section_count"][n])
        if count and (at % 64 or at < size or at + count * RECORDS[name].itemsize > len(blob)):
            raise ProgramError(f"section {name} ({count} records at {at}) is not inside of the {len(blob)} bytes")
        out[name] = np.frombuffer(blob, RECORDS[name], count, at if count else 0)
    return Program(blob, head, out)
