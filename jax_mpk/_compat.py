"""Everything that differs between the supported versions of JAX (0.10.2 to 0.12.0.1), in one place.

Primitives are named by strings everywhere else, because many primitive objects are not exported.
"""

from __future__ import annotations

import functools
import os
import sysconfig
from typing import Any

import jax

_STDLIB = sysconfig.get_path("stdlib") + os.sep
_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """(jaxpr, consts) of a `Jaxpr` or a `ClosedJaxpr` (one class since 0.11)."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def is_literal(atom: Any) -> bool:
    """True for a literal operand of an equation, False for a variable."""
    return hasattr(atom, "val")


def is_dropped(var: Any) -> bool:
    """True for the `_` on the left of an equation."""
    return type(var).__name__ == "DropVar"


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(constants, carries) of a `scan`; since 0.11 they are told by trees."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _xs = params["ft_in"].unpack()
    return len(consts), len(carry)


def gather_mode(mode: Any) -> str:
    """The mode of a gather or scatter: "clip", "fill" or "promise" (for `PROMISE_IN_BOUNDS`)."""
    name = getattr(mode, "name", str(mode)).lower()
    return "clip" if "clip" in name else "fill" if "fill" in name else "promise"


def key_width(dtype: Any) -> int | None:
    """How many uint32 words a PRNG key of `dtype` has; None if it is no key dtype or not Threefry."""
    if not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    impl = getattr(dtype, "_impl", None)
    return 2 if getattr(impl, "name", "") == "threefry2x32" else None


def threefry_partitionable() -> bool:
    """Whether random bits are a function of their index alone (the default since JAX 0.5)."""
    return bool(getattr(jax.config, "jax_threefry_partitionable", True))


# ---------------------------------------------------------------------------------------------------- source locations


@functools.lru_cache(maxsize=4096)
def _rank(file: str) -> int:
    """2 for the user's own files, 1 for other packages, 0 for JAX, Flax, the standard library and this package."""
    path = file.replace(os.sep, "/")
    if file.startswith(_OWN) or file.startswith("<"):
        return 0
    if "/site-packages/" in path or "/dist-packages/" in path:
        package = path.rsplit("-packages/", 1)[1].split("/", 1)[0]
        return 0 if package in ("jax", "jaxlib", "flax", "jax_mpk") else 1
    return 0 if file.startswith(_STDLIB) else 2


def user_where(eqn: Any) -> str:
    """`file:line (function)` of the user's line behind an equation, or "" when nothing is known.

    It is the innermost frame outside installed packages, else the innermost outside JAX and Flax.
    """
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    if traceback is None:
        return ""
    return _where(traceback)


@functools.lru_cache(maxsize=16384)
def _frame(code: Any, lasti: int) -> str:
    line = next((n for a, b, n in code.co_lines() if a <= lasti < b and n is not None), code.co_firstlineno)
    return f"{code.co_filename}:{line} ({code.co_qualname})"


def _where(traceback: Any) -> str:
    codes, lastis = traceback.raw_frames()
    best = -1
    for n, code in enumerate(codes):
        rank = _rank(code.co_filename)
        if rank == 2:
            best = n
            break
        if rank == 1 and best < 0:
            best = n
    return _frame(codes[best], lastis[best]) if best >= 0 else ""


def is_library(jaxpr: Any) -> bool:
    """True when the traced function is part of JAX or Flax (`jit[_where]`, `jit[silu]`, ...).

    Its trace is cached, so the lines inside it may be those of an earlier, unrelated call.
    """
    info = getattr(getattr(open_jaxpr(jaxpr)[0], "debug_info", None), "func_src_info", None) or ""
    file = info.rsplit(" at ", 1)[-1].rsplit(":", 1)[0]
    return bool(file) and _rank(file) == 0
