"""Everything that differs between the supported versions of JAX (0.10.2 to 0.12.0.1), in one place.

Primitives are named by strings everywhere else, because many primitive objects are not exported.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from jax_mpk.errors import MegakernelWarning

_STDLIB, _SCRIPTS = (sysconfig.get_path(p) + os.sep for p in ("stdlib", "scripts"))
_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_CALL = _OWN + "api.py"
_TYPED = ("<stdin>", "<string>", "<ipython-input", "<console>", "<input>", "<doctest")


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """(jaxpr, consts) of a `Jaxpr` or a `ClosedJaxpr` (one class since 0.11)."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def subjaxprs(eqn: Any) -> list[Any]:
    """The jaxprs in the parameters of an equation."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
    return [v for v in values if hasattr(open_jaxpr(v)[0], "eqns")]


CALLS = frozenset(("jit", "pjit", "closed_call", "core_call", "call", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call",
                   "custom_vjp_call_jaxpr", "remat2", "checkpoint", "remat", "custom_lin", "core_closed_call", "megakernel"))  # fmt: skip
"""Primitives that do no more than what the jaxpr in their parameters says, once."""


def called(eqn: Any) -> Any:
    """The jaxpr that a call calls, or None."""
    return next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)


_PLACES = (
    "sharding",
    "layout",
    "dst_sharding",
    "devices",
    "in_shardings",
    "out_shardings",
    "in_layouts",
    "out_layouts",
)


def places(eqn: Any) -> list[Any]:
    """Where an equation puts values, other than whole on each device in its usual memory."""
    values = [eqn.params.get(k) for k in _PLACES]
    return [p for v in values for p in (v if isinstance(v, tuple | list) else (v,)) if not _is_everywhere(p)]


def _is_everywhere(place: Any) -> bool:
    if place is None or isinstance(place, jax.Device) or type(place).__name__ == "UnspecifiedValue":
        return True  # `jit` ignores a device
    if isinstance(place, jax.memory.Space):
        return bool(place == jax.memory.Space.Device)
    if not isinstance(place, jax.sharding.Sharding) or place.memory_kind not in (None, "device"):
        return False
    if isinstance(place, jax.sharding.NamedSharding):
        return place.mesh.size <= 1 or all(x is None or x is place.spec.UNCONSTRAINED for x in place.spec)
    return bool(place.is_fully_replicated)


def renamed(debug_info: Any, arguments: Sequence[str], results: Sequence[str]) -> Any:
    """The debug info of a jaxpr, for one with other arguments and results."""
    return debug_info._replace(arg_names=tuple(arguments), result_paths=tuple(results))


def argument_names(jaxpr: Any) -> Sequence[str]:
    """What the arguments of a jaxpr are called, "" where nobody knows."""
    jaxpr = open_jaxpr(jaxpr)[0]
    return _names(jaxpr.debug_info.arg_names, len(jaxpr.invars))


def result_names(jaxpr: Any) -> Sequence[str]:
    """What the results of a jaxpr are called, "" where nobody knows."""
    jaxpr = open_jaxpr(jaxpr)[0]
    return _names(jaxpr.debug_info.result_paths, len(jaxpr.outvars))


def _names(known: Any, n: int) -> Sequence[str]:
    return [x or "" for x in known] if isinstance(known, tuple) and len(known) == n else [""] * n


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
    if file.startswith("<"):  # a prompt, `python -c` and cells are the user's; frozen and generated code is not
        return 2 if file.startswith(_TYPED) else 0
    if file.startswith(_OWN):
        return 0
    if "/site-packages/" in path or "/dist-packages/" in path:
        package = path.rsplit("-packages/", 1)[1].split("/", 1)[0]
        return 0 if package in ("jax", "jaxlib", "flax", "jax_mpk") else 1
    if file.startswith(_SCRIPTS):
        return 1
    return 0 if file.startswith(_STDLIB) else 2


def _blamed(codes: Sequence[types.CodeType], traced: bool) -> int:
    """Which of the frames with these codes, innermost first, a message names; -1 for none.

    The innermost frame of the user's own. Where everything is installed: in a traced function the wrapped one, which is
    the outermost frame of a package inside of `megakernelize`'s own call, and not what it calls; else the innermost frame
    of a package, which is who called.
    """
    innermost = outermost = wrapped = -1
    for n, code in enumerate(codes):
        rank = _rank(code.co_filename)
        if rank == 2 and not code.co_qualname.startswith("__create_fn__"):  # `<string>`, made by a dataclass
            return n
        if rank == 1:
            innermost, outermost = (n if innermost < 0 else innermost), n
        if code.co_filename == _CALL:
            wrapped = outermost
    return innermost if not traced else wrapped if wrapped >= 0 else outermost


def user_where(eqn: Any) -> str:
    """`file:line (function)` of the user's line behind an equation, or "" when nothing is known; see `_blamed`. Since JAX
    0.10 the frames behind an equation are those of the traced function alone."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    if traceback is None:
        return ""
    codes, lastis = traceback.raw_frames()
    n = _blamed(codes, traced=True)
    return _frame(codes[n], lastis[n]) if n >= 0 else ""


def _caller() -> types.FrameType:
    """The frame of the user's that led here."""
    frame: types.FrameType | None = sys._getframe(1)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[_blamed([f.f_code for f in frames], traced=False)]


def here(where: str = "") -> str:
    """`file:line (function)` of the user's line that led here: what is being called, traced or compiled. With the line of
    an equation that is not the user's: both; a line of the user's stays as it is."""
    frame = _caller()
    line = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_qualname})"
    if not where:
        return line
    foreign = _rank(where.rsplit(":", 1)[0]) < 2 <= _rank(frame.f_code.co_filename)
    return f"{line}, in {where}" if foreign else where


@functools.lru_cache(maxsize=16384)
def _frame(code: Any, lasti: int) -> str:
    line = next((n for a, b, n in code.co_lines() if a <= lasti < b and n is not None), code.co_firstlineno)
    return f"{code.co_filename}:{line} ({code.co_qualname})"


def warn(text: str) -> None:
    """A `MegakernelWarning` at the user's line that led here (not in JAX, which called us)."""
    at = _caller()
    warnings.warn_explicit(text, MegakernelWarning, at.f_code.co_filename, at.f_lineno, at.f_globals.get("__name__"),
                           at.f_globals.setdefault("__warningregistry__", {}))  # fmt: skip


def is_library(jaxpr: Any) -> bool:
    """True when the traced function is part of an installed package (`jit[_where]`, `jit[silu]`, ...).

    Its trace is cached, so the lines inside it may be those of an earlier, unrelated call.
    """
    info = getattr(getattr(open_jaxpr(jaxpr)[0], "debug_info", None), "func_src_info", None) or ""
    file = info.rsplit(" at ", 1)[-1].rsplit(":", 1)[0]
    return bool(file) and _rank(file) < 2
