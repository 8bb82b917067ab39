"""Cases in worker processes: one that crashes or hangs costs its own case, and a fresh process goes on.

What XLA does to a function of its own is not our business: where `jax.jit` crashes or hangs, the case is refused, and where
the compiler does not come back from a reference, the case is tried again with one that is compiled in small pieces.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

HANG, SHRINK = 120.0, 400.0
"""Seconds after which a case that does not end is a hang, and after which its smallest form is what was found so far."""


@dataclass(frozen=True)
class Settings:
    implementation: str = "cpu"
    arch: str = ""
    shrink: bool = True


@dataclass(frozen=True)
class Answer:
    """`kind` as in `run.Verdict`, or "crash" or "hang"; `text`: what failed and the function, or ""."""

    seed: int
    kind: str
    text: str = ""


def answers(seeds: Iterable[int], jobs: int, settings: Settings) -> Iterator[Answer]:
    """The answer of every seed, in any order."""
    todo = iter(seeds)
    workers = [_Worker(settings) for _ in range(jobs)]
    live = [w for w in workers if w.give(todo)]
    while live:
        multiprocessing.connection.wait([w.pipe for w in live], timeout=1.0)
        for w in list(live):
            done = w.answer()
            if done is not None:
                yield done
                if not w.give(todo):
                    live.remove(w)
    for w in workers:
        w.end()


class _Worker:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.process = settings, None
        self.pipe: Any = None

    def give(self, todo: Iterator[int]) -> bool:
        """Starts the next case, if there is one."""
        self.seed = next(todo, None)
        if self.seed is None:
            return False
        self._start(whole=True)
        return True

    def _start(self, whole: bool) -> None:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.stacks = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
            self.process = context.Process(target=_work, args=(theirs, self.settings, self.stacks.name), daemon=True)
            self.process.start()
            theirs.close()
        self.whole, self.stage, self.first = whole, "start", None
        self.until = time.monotonic() + HANG
        self.pipe.send((self.seed, whole))

    def answer(self) -> Answer | None:
        """The answer, if the case has ended, or has to be ended."""
        try:
            while self.pipe.poll():
                stage, answer = self.pipe.recv()
                if stage == "final":
                    return answer
                if stage == "found":
                    self.first, self.until = answer, time.monotonic() + SHRINK
                else:
                    self.stage = stage
        except (EOFError, OSError):
            self.process.join(10)
            code, where = self.process.exitcode, self._stacks()
            self.end()
            return self.first or self._lost("crash", f"the process ended with {code}\n{where}")
        if time.monotonic() > self.until:
            os.kill(self.process.pid, signal.SIGABRT)
            self.process.join(10)
            where = self._stacks()
            self.end()
            if self.stage == "judge" and self.whole and self.first is None:
                self._start(whole=False)
                return None
            return self.first or self._lost("hang", f"no end after {HANG:.0f} s\n{where}")
        return None

    def _lost(self, kind: str, text: str) -> Answer:
        return Answer(self.seed, "refused") if self.stage == "jit" else Answer(self.seed, kind, text)

    def _stacks(self) -> str:
        """Where the threads of a process were that ended by a signal."""
        with open(self.stacks.name) as file:
            return file.read()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def prepare(implementation: str) -> None:
    """The environment of a process that runs cases, before JAX starts."""
    faulthandler.enable()
    os.environ.setdefault("JAX_MPK_CACHE_DIR", "")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many processes share a GPU
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    flags = os.environ.get("XLA_FLAGS", "")  # XLA's code need not be fast: most of a case's time was tuning it
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    if implementation != "cuda":
        os.environ["JAX_PLATFORMS"] = "cpu"


def _work(pipe: Any, settings: Settings, stacks: str) -> None:
    prepare(settings.implementation)
    file = open(stacks, "w")  # noqa: SIM115
    faulthandler.enable(file)
    import jax

    from tests.fuzz.grow import grow
    from tests.fuzz.run import verdict
    from tests.fuzz.shrink import shrink

    n = 0
    while True:
        seed, whole = pipe.recv()
        case = grow(seed)
        v = verdict(case, settings.implementation, settings.arch, whole, lambda stage: pipe.send((stage, None)))
        if v.bad:
            pipe.send(("found", Answer(seed, v.kind, f"{v.text}\n{case.source()}")))
            if settings.shrink:
                case = shrink(case, lambda c: v.like(verdict(c, settings.implementation, settings.arch)))  # noqa: B023
                v = verdict(case, settings.implementation, settings.arch)
            pipe.send(("final", Answer(seed, v.kind, f"{v.text}\n{case.source()}")))
        else:
            pipe.send(("final", Answer(seed, v.kind)))
        n += 1
        if n % 100 == 0:
            jax.clear_caches()
