"""The program format: the checked-in C++ header is the generated one; encoding and decoding are inverse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jax_mpk import _ext, abi
from tests.unit import executor_builder as eb

ROOT = Path(__file__).parents[2]


def program() -> bytes:
    b = eb.Builder()
    x, out = b.arg(400), b.result(400)
    b.tasks(eb.elementwise(b, "negate", x, out, 100, 30, [eb.instr("F_NEG", eb.V + 1, eb.V)], eb.V + 1))
    return b.blob()


def test_the_header_is_up_to_date() -> None:
    assert (ROOT / "ffi" / "abi.h").read_text() == abi.header(), "run: python -m jax_mpk.abi > ffi/abi.h"


def test_records_are_aligned_for_c() -> None:
    """The C++ structs have no padding of their own: every field is at a multiple of its size."""
    for name, dtype in abi.RECORDS.items():
        for field in dtype.names or ():
            sub, offset = dtype.fields[field][:2]
            assert offset % sub.base.itemsize == 0, f"{name}.{field}"


def test_encode_then_decode() -> None:
    blob = program()
    p = abi.decode(blob)
    assert p.header["args"] == p.header["results"] == 1 and len(p["Task"]) == 4
    assert p.name(int(p["Op"][0]["name"])) == "negate"
    assert abi.encode(p.sections, **p.settings) == blob
    assert all(
        int(at) % 64 == 0 or n == 0
        for at, n in zip(p.header["section_offset"][: len(abi.SECTIONS)], p.header["section_count"], strict=False)
    )


@pytest.mark.parametrize("at", [0, 5, 9, 17, 100, 700, -1])
def test_python_and_the_executor_refuse_a_flipped_bit(at: int) -> None:
    blob = bytearray(program())
    blob[at] ^= 4
    with pytest.raises(abi.ProgramError):
        abi.decode(bytes(blob))
    with pytest.raises(_ext.ProgramError):
        _ext.check(bytes(blob))


def test_truncated() -> None:
    blob = program()
    size = abi.RECORDS["Header"].itemsize
    for n in (0, 7, size - 1, size, len(blob) - 1):
        with pytest.raises(abi.ProgramError):
            abi.decode(blob[:n])
        with pytest.raises(_ext.ProgramError):
            _ext.check(blob[:n])


def test_the_executor_is_of_this_version() -> None:
    info = _ext.info()
    assert info["abi_version"] == abi.VERSION
    assert info["isa"] in info["isas"] and "plain" in info["isas"]
    assert info["threads"] >= 1 and info["ffi_version"][0] == 0 and 3 <= info["ffi_version"][1] <= 5
    assert isinstance(np.float64(_ext.read_bandwidth(1 << 20, 2)), float)
