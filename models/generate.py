"""Generate text: ``python -m models.generate --model demo --prompt "It was a truth"``.

Text goes to standard output, progress and the summary to standard error. Exit status: 0, or 1 for a failure and 2 for a
mistake in the command (each with a message), 130 after Ctrl-C, 141 if nobody reads the output any more.

This module imports nothing that takes time, so that mistakes are reported, and Ctrl-C is understood, from the start.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # until ``Interrupt`` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from models.common import limits
from models.common.errors import ModelError, UsageError
from models.common.fields import Kind


class Interrupt:
    """Ctrl-C: ends the process at once, unless there is something to finish first.

    Attributes:
      graceful: whether the next Ctrl-C only sets ``requested``. A second one ends the process all the same.
      requested: whether to stop.
    """

    STATUS = 128 + signal.SIGINT

    def __init__(self) -> None:
        self.graceful = self.requested = False

    def install(self) -> None:
        """Take over from Python, whose KeyboardInterrupt would wait for a compilation, and end in a traceback.

        A process that was started to ignore Ctrl-C, as in the background of a script, goes on doing so.
        """
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGINT, lambda *_: None)  # the thread does it, also while the main one is not in Python
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def _watch(self, wakeups: int) -> None:
        while signals := os.read(wakeups, 64):
            if signal.SIGINT in signals:
                self._interrupted()

    def _interrupted(self) -> None:
        if self.graceful and not self.requested:
            self.requested = True
            return
        # On a terminal, a progress bar has hidden the cursor, and the line has something in it.
        before = b"\x1b[?25h\n" if os.isatty(2) else b""
        try:
            os.write(2, before + b"interrupted\n")
        finally:
            os._exit(self.STATUS)


def option(kind: Kind, convert: Callable[[str], Any] = float) -> Callable[[str], Any]:
    """The argparse type of a number; its message says which numbers there are."""

    def parse(text: str) -> Any:
        try:
            return kind(convert(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind}, not {text!r}") from None

    return parse


def prompt(text: str) -> str:
    """The argparse type of a prompt."""
    if not text:
        raise argparse.ArgumentTypeError("the prompt has no tokens: it is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, not {ascii(text)}") from None
    return text


def directory(text: str) -> Path:
    """The argparse type of a directory; whether it is one is found when it is read."""
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, not ''")
    return Path(text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.generate", description="Generate text.")
    add = parser.add_argument
    add("--model", help="a name, as models/README.md lists them; default: the checkpoint's own, or demo")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=directory, help="with config.json, tokenizer.json and safetensors")
    weights.add_argument(
        "--weights-seed", type=option(limits.SEED, int), help="random weights from this seed instead of a checkpoint"
    )
    add("--prompt", type=prompt, default="It is a truth universally acknowledged, that")
    add("--max-new-tokens", type=option(limits.NEW_TOKENS, int), default=128)
    add("--implementation", choices=["auto", "none", "cpu", "cuda", "xla", "jit"], default="auto")
    add(
        "--temperature",
        type=option(limits.TEMPERATURE),
        default=0.0,
        help=f"{limits.TEMPERATURE}; 0 (default): always the likeliest token",
    )
    add("--seed", type=option(limits.SEED, int), default=0, help=f"for sampling: {limits.SEED}")
    add(
        "--batch",
        type=option(limits.BATCH, int),
        default=1,
        help=f"independent sequences, {limits.BATCH}; the first is streamed",
    )
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args(argv)
    if args.model is None and args.checkpoint is None:
        args.model = "demo"
    return args


def main(argv: Sequence[str] | None = None, interrupt: Interrupt | None = None) -> int:
    """Run the command; returns its exit status. What can go wrong is a message on standard error, and no traceback."""
    interrupt = Interrupt() if interrupt is None else interrupt
    args = parse(argv)
    try:
        from models.generation import run
    except ModuleNotFoundError as error:
        print(f"error: {error}; the models need: pip install 'jax_mpk[models]'", file=sys.stderr)
        return 1
    try:
        run(args, interrupt)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return interrupt.STATUS if interrupt.requested else 0


def process() -> int:
    """``main`` as the whole of a process: with what signals and closed or full outputs do to one."""
    interrupt = Interrupt()
    interrupt.install()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))
        else:
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    try:
        try:
            status = main(interrupt=interrupt)
        except SystemExit as error:  # argparse has spoken
            status = error.code
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # now, while a failure can still be told
        return status
    except BrokenPipeError:
        _discard(sys.stdout, sys.stderr)
        return 128 + signal.SIGPIPE
    except OSError as error:
        _discard(sys.stdout)
        print(f"error: {error}", file=sys.stderr)
        return 1


def _discard(*streams: TextIO) -> None:
    """Whatever ``streams`` have not written is lost. Otherwise Python would try again at its end, and complain."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(process())
