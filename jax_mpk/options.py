"""Every knob of the package, in one typed table (`python -m jax_mpk.options` prints it).

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


def _knob(default: Any, help: str, *, codegen: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "codegen": codegen})


@dataclass(frozen=True)
class Options:
    """The knobs. Frozen, hashable: a parameter of the primitive. Raises `TypeError` or `ValueError` if wrong."""

    dump: str = _knob("", "directory for the text of every pass (NN_pass.txt) and the program listing; '' = none")
    stop_after: str = _knob(
        "", "last compiler pass to run, for looking at its output; such a function does not run as a megakernel"
    )
    cache_dir: str | None = _knob(None, "directory of compiled programs; '' = no disk cache, unset = the user's cache")
    cache_bytes: int = _knob(1 << 30, "size bound of the disk cache; the least recently used programs are removed")
    cache_entries: int = _knob(64, "compiled programs kept in memory; 0 = none")
    deadline_ms: int = _knob(60_000, "a launch in which no task ends for so long fails, and says who waits for whom")
    threads: int = _knob(0, "CPU: threads of a launch; 0 = one per core")
    seed: int = _knob(0, "CPU: run the tasks one by one in a random order that the events allow; 0 = in parallel")
    workers: int = _knob(0, "workers that placement plans for; 0 = the target's number", codegen=True)
    tasks: int = _knob(0, "tasks an operator that decomposition aims for; 0 = the target's number", codegen=True)
    columns: int = _knob(0, "columns of a contraction task; 0 = the target's number", codegen=True)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds: tuple[type, ...] = {"str": (str,), "int": (int,), "str | None": (str, type(None))}[str(f.type)]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"option {f.name} takes {f.type}, not {value!r}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"option {f.name} is at least 0, not {value}")

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
    """The defaults with every `JAX_MPK_*` variable applied; `ValueError` for a bad value names the variable."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for f in dataclasses.fields(Options):
        text = environ.get(variable(f.name))
        if text is None:
            continue
        try:
            values[f.name] = int(text) if f.type == "int" else text
            Options(**{f.name: values[f.name]})
        except ValueError as e:
            raise ValueError(f"{variable(f.name)}={text!r}: {e}") from None
    return Options(**values)


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


if __name__ == "__main__":
    print(describe())
