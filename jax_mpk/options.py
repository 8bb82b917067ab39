"""Every knob of the package, in one typed table (`python -m jax_mpk` prints it).

A knob has a name, a type and a default here and nowhere else. Its value comes from, in this order: the `options=` of
`megakernelize`, an enclosing `with jax_mpk.override(...)`, the environment variable `JAX_MPK_<NAME>`, the default.

Options are read when a function is *traced*. A function that an outer `jax.jit` has already traced keeps the options it
was traced with, like everything else that Python decides at trace time.

Verification has no knob: every program is verified before its first launch.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jax_mpk.errors import OptionError

SWITCH = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}
"""How an environment variable spells a bool."""
WINDOW = 3
"""Copies of the weight stream in flight, unless a knob says otherwise: what was fastest on an H100."""


def _knob(default: Any, help: str, *, codegen: bool = False, least: int = 0, most: int = 0) -> Any:
    """`least`, `most`: bounds of an int, inclusive. What takes memory or time in proportion has a bound that is far beyond
    any use and still harmless."""
    return field(default=default, metadata={"help": help, "codegen": codegen, "least": least, "most": most})


@dataclass(frozen=True)
class Options:
    """The knobs. Frozen, hashable: a parameter of the primitive. Raises `TypeError` or `OptionError` if wrong."""

    dump: str = _knob("", "directory for the text of every pass (NN_pass.txt) and the program listing; '' = none")
    stop_after: str = _knob(
        "", "last compiler pass to run, for looking at its output; such a function does not run as a megakernel"
    )
    choose: bool = _knob(
        True,
        "implementation=None: XLA where it is predicted to be as fast; off = a megakernel wherever one can be made",
    )
    split: bool = _knob(
        False,
        "a named implementation: what has no rule is cut out and runs through XLA, as implementation=None does it; off = error",
    )
    cache_dir: str | None = _knob(None, "directory of compiled programs; '' = no disk cache, unset = the user's cache")
    cache_bytes: int = _knob(
        1 << 30, "size bound of the disk cache; the least recently used programs are removed", most=(1 << 63) - 1
    )
    cache_entries: int = _knob(64, "compiled programs kept in memory; 0 = none", most=1_000_000)
    deadline_ms: int = _knob(
        60_000, "a launch in which no task ends for so long fails, and says who waits for whom", most=(1 << 31) - 1
    )
    threads: int = _knob(0, "CPU: threads of a launch; 0 = one per core", most=255)
    seed: int = _knob(
        0, "CPU: run the tasks one by one in a random order that the events allow; 0 = in parallel", most=(1 << 63) - 1
    )
    workers: int = _knob(0, "workers that placement plans for; 0 = the target's number", codegen=True, most=4096)
    tasks: int = _knob(
        0, "tasks an operator that decomposition aims for; 0 = the target's number", codegen=True, most=1 << 16
    )
    columns: int = _knob(0, "columns of a contraction task; 0 = the target's number", codegen=True, most=1 << 16)
    arch: str = _knob(
        "", "CUDA: use what this architecture has and no more, as sm_80; '' = the device's own", codegen=True
    )
    stream: bool = _knob(
        True, "CUDA: stream weights by tensor copies (sm_90 on); off = read them where they lie", codegen=True
    )
    window: int = _knob(WINDOW, "CUDA: frames of the ring in flight at once", codegen=True, least=1, most=63)
    ring: int = _knob(
        0, "CUDA: frames of 16 KiB in a block's ring; 0 = what fits; more than the window", codegen=True, most=64
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds: dict[str, tuple[type, ...]] = {
                "str": (str,),
                "int": (int,),
                "bool": (bool,),
                "str | None": (str, type(None)),
            }
            if not isinstance(value, kinds[str(f.type)]) or isinstance(value, bool) != (f.type == "bool"):
                raise TypeError(f"option {f.name} takes {f.type}, not {value!r}")
            if f.type == "int":
                for ok, word, bound in (
                    (value >= f.metadata["least"], "least", f.metadata["least"]),
                    (value <= f.metadata["most"], "most", f.metadata["most"]),
                ):
                    if not ok:
                        raise OptionError(f"option {f.name} is at {word} {bound}, not {value}")
            if isinstance(value, str) and "\0" in value:
                raise OptionError(f"option {f.name} has a NUL in it: {value!r}")
        if self.stop_after:
            from jax_mpk.compiler import PASSES  # late: the compiler imports the options

            if self.stop_after not in (names := [p.name for p in PASSES]):
                raise OptionError(f"stop_after={self.stop_after!r} is no pass; the passes are {', '.join(names)}")
        if self.arch and not re.fullmatch(r"sm_[1-9]\d{1,2}[af]?", self.arch):
            raise OptionError(f"option arch is the name of an architecture, as sm_80 or sm_90a, not {self.arch!r}")
        if self.ring and self.ring <= self.window:
            raise OptionError(f"option ring is 0 or more than the window of {self.window} frames, not {self.ring}")

    def codegen(self) -> tuple[tuple[str, Any], ...]:
        """The knobs that change the program: part of the key of every cache."""
        return tuple((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.metadata["codegen"])

    def cache_path(self) -> Path | None:
        """Where compiled programs are kept, or None."""
        if self.cache_dir is not None:
            return Path(self.cache_dir) if self.cache_dir else None
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return Path(base) / "jax_mpk"


def variable(name: str) -> str:
    """The environment variable of a knob."""
    return f"JAX_MPK_{name.upper()}"


def from_environment(environ: Mapping[str, str] | None = None) -> Options:
    """The defaults with every `JAX_MPK_*` variable applied; `OptionError` for a bad value names the variable."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for f in dataclasses.fields(Options):
        text = environ.get(variable(f.name))
        if text is None:
            continue
        try:
            values[f.name] = _parse(str(f.type), text)
            Options(**values)
        except ValueError as e:
            raise OptionError(f"{variable(f.name)}={text!r}: {e}") from None
    return Options(**values)


def _parse(kind: str, text: str) -> Any:
    if kind == "bool":
        if text.lower() not in SWITCH:
            raise ValueError(f"a switch is one of {', '.join(SWITCH)}")
        return SWITCH[text.lower()]
    return int(text) if kind == "int" else text


_overrides: contextvars.ContextVar[tuple[tuple[str, Any], ...]] = contextvars.ContextVar("jax_mpk_options", default=())


@contextlib.contextmanager
def override(**knobs: Any) -> Iterator[None]:
    """`with override(dump="out"): ...` changes knobs for what this thread traces inside; nests."""
    replace(Options(), **knobs)  # wrong names and types fail here
    token = _overrides.set((*_overrides.get(), *knobs.items()))
    try:
        yield
    finally:
        _overrides.reset(token)


def current(given: Options | Mapping[str, Any] | None = None) -> Options:
    """The options that are in force: `given` (complete, or some knobs by name) over overrides over the environment."""
    if isinstance(given, Options):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"options is an Options or a mapping of knobs, not {type(given).__name__}")
    return replace(from_environment(), **{**dict(_overrides.get()), **(given or {})})


def describe() -> str:
    """The table of knobs: variable, type, value in force, meaning."""
    now, rows = current(), []
    for f in dataclasses.fields(Options):
        rows.append((variable(f.name), str(f.type), repr(getattr(now, f.name)), f.metadata["help"]))
    width = [max(len(r[c]) for r in rows) for c in range(3)]
    return "\n".join("  ".join([*(r[c].ljust(width[c]) for c in range(3)), r[3]]) for r in rows)
