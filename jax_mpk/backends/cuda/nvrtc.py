"""NVRTC through ctypes: CUDA source to a CUBIN, from the library that JAX's CUDA wheels (or a toolkit) bring.

No GPU and no driver are needed. CUBINs are kept on disk by what they are made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jax_mpk.cache import Disk
from jax_mpk.errors import MpkError, UnsupportedError

FLAGS = ("-std=c++17", "-default-device", "--extra-device-vectorization", "--ptxas-options=-v", "--disable-warnings")
SUFFIX, LIMIT = ".cubin", 256 << 20


class CompileError(MpkError):
    """NVRTC rejected a generated source: a bug of this package. The message has the log."""


@dataclass(frozen=True)
class Cubin:
    """Machine code and what ptxas said about it (empty if it came from the cache)."""

    code: bytes
    log: str

    def resources(self) -> dict[str, int]:
        """registers and stack bytes, the most of any function, and bytes of spill stores and loads, of all together."""
        found = {"registers": r"Used (\d+) registers", "spill": r"(\d+) bytes spill", "stack": r"(\d+) bytes stack"}
        numbers = {k: [0, *map(int, re.findall(p, self.log))] for k, p in found.items()}
        return {k: sum(n) if k == "spill" else max(n) for k, n in numbers.items()}


@functools.cache
def library() -> ctypes.CDLL:
    """The newest NVRTC of this process' environment; raises `UnsupportedError` if there is none."""
    for path in _candidates():
        with contextlib.suppress(OSError):
            for extra in sorted(glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so*"))):
                if ".alt." not in extra:  # some wheels do not find their own builtins
                    ctypes.CDLL(extra, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)
    raise UnsupportedError(
        "megakernel", "no NVRTC was found: pip install 'jax[cuda13]' (or nvidia-cuda-nvrtc) brings one"
    )


def _candidates() -> list[str]:
    """Paths of libnvrtc: an explicit one, wheels, toolkits, the loader's own search."""
    out = [os.environ.get("JAX_MPK_NVRTC", "")]
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        for pattern in ("cu13/lib", "cuda_nvrtc/lib"):
            out += sorted(glob.glob(os.path.join(base, pattern, "libnvrtc.so.*[0-9]")), reverse=True)
    for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        out += sorted(glob.glob(os.path.join(home, "lib64", "libnvrtc.so.*")), reverse=True) if home else []
    return [p for p in (*out, "libnvrtc.so.13", "libnvrtc.so.12") if p and ".alt." not in p]


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile(source: str, arch: str, *, cache: Path | None = None) -> Cubin:
    """The CUBIN of `source` for `arch` ("sm_90a"); raises `CompileError`."""
    key = hashlib.sha256(repr((version(), arch, FLAGS, source)).encode()).digest()
    disk = Disk(cache, LIMIT, SUFFIX, _is_cubin) if cache else None
    entry = disk.get(key) if disk else None
    if entry is not None:
        return Cubin(entry[_HEAD:], "")
    cubin = Cubin(*_compile(source, arch, "CUBIN"))
    if disk:
        disk.put(key, key + hashlib.sha256(cubin.code).digest() + cubin.code)
    return cubin


_HEAD = 64
"""Bytes before the machine code in a file: the key that it was built from, its hash."""


def _is_cubin(key: bytes, entry: bytes) -> bool:
    return entry[:_HEAD] == key + hashlib.sha256(entry[_HEAD:]).digest()


def ptx(source: str, arch: str) -> str:
    """The PTX of `source`, for people and for tests of what ptxas is given; raises `CompileError`."""
    return _compile(source, arch.replace("sm_", "compute_"), "PTX")[0].rstrip(b"\0").decode()


def _compile(source: str, arch: str, form: str) -> tuple[bytes, str]:
    """The "CUBIN" or "PTX" of `source`, and what the compiler said."""
    lib, program = library(), ctypes.c_void_p()
    flags = [f.encode() for f in (*FLAGS, f"--gpu-architecture={arch}")]
    if lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"program.cu", 0, None, None):
        raise CompileError("NVRTC could not create a program")
    try:
        status = lib.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = _fetch(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(f"NVRTC {status} for {arch}:\n{log}")
        return _fetch(getattr(lib, f"nvrtcGet{form}Size"), getattr(lib, f"nvrtcGet{form}"), program), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    n = ctypes.c_size_t()
    size(program, ctypes.byref(n))
    buffer = ctypes.create_string_buffer(n.value)
    get(program, buffer)
    return buffer.raw
