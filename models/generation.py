"""Generating tokens with a model, and what ``python -m models.generate`` does once its command line is read."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from models import registry
from models.common import limits
from models.common.config import DecoderConfig
from models.common.decoder import Decoder
from models.common.errors import ModelError, UsageError
from models.common.fields import shown, wrong
from models.common.initialize import num_bytes
from models.common.memory import require_memory
from models.common.tokenizer import StreamDecoder, check_vocabulary, encode, load_tokenizer
from models.decode import greedy_step, prefill, sample, sample_step

if TYPE_CHECKING:
    from models.generate import Interrupt

PREFILL_BLOCK = 64  # one compiled shape serves prompts of any length
OPTIONS = {
    "max_new_tokens": limits.NEW_TOKENS,
    "batch": limits.BATCH,
    "temperature": limits.TEMPERATURE,
    "seed": limits.SEED,
}
"""The numbers that ``generate`` takes, and what they may be."""

Wrapper = Callable[[Callable], Callable]


@dataclasses.dataclass
class Timings:
    """Filled in by ``generate``; seconds, and tokens of one sequence."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    batch: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    wrap: Wrapper = lambda step: step,
    on_prefill: Callable[[int], None] = lambda tokens: None,
    timings: Timings | None = None,
) -> Iterator[np.ndarray]:
    """Continue ``prompt`` in ``batch`` independent sequences, one int32 ``[batch]`` of tokens at a time.

    Args:
      prompt: token ids of the model's vocabulary, at least one.
      temperature: 0 takes the likeliest token, so that all sequences are the same.
      seed: for sampling; the same seed gives the same tokens.
      wrap: applied to the decode step before ``jax.jit``.
      on_prefill: called with the number of prompt tokens done so far.

    Raises:
      UsageError: see ``check_request``.
    """
    timings = Timings() if timings is None else timings
    length = len(prompt)
    options = dict(max_new_tokens=max_new_tokens, batch=batch, temperature=temperature, seed=seed)
    check_request(model.config, prompt, jnp.dtype(model.dtype), **options)
    if not max_new_tokens:
        return
    graphdef, state = nnx.split(model)
    slots = _slots(length + max_new_tokens)
    cache = model.init_cache(batch, slots)
    key = jax.random.key(seed)
    sampling = (key, np.float32(temperature)) if temperature > 0 else ()

    clock = time.perf_counter()
    # Both functions return the cache that they are given, so its memory is reused in place.
    step = partial(sample_step if sampling else greedy_step, graphdef)
    token = np.zeros(batch, np.int32)
    step = jax.jit(wrap(step), donate_argnums=2).lower(state, token, cache, np.int32(0), *sampling).compile()
    fill = jax.jit(partial(prefill, graphdef), donate_argnums=2)
    block = np.zeros((batch, PREFILL_BLOCK), np.int32)
    fill = fill.lower(state, block, cache, np.int32(0), np.int32(0)).compile()
    timings.compile = time.perf_counter() - clock

    clock = time.perf_counter()
    for start in range(0, length, PREFILL_BLOCK):
        ids = np.asarray(prompt[start : start + PREFILL_BLOCK], np.int32)
        block = np.broadcast_to(np.pad(ids, (0, PREFILL_BLOCK - len(ids))), (batch, PREFILL_BLOCK))
        logits, cache = fill(state, block, cache, np.int32(start), np.int32(len(ids) - 1))
        logits.block_until_ready()
        on_prefill(start + len(ids))
    if sampling:
        # The draw at a position is keyed by that position, here the last of the prompt.
        token = sample(logits, jax.random.fold_in(key, length - 1), temperature)
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token.block_until_ready()
    timings.prefill = time.perf_counter() - clock

    clock = time.perf_counter()
    for pos in range(length, length + max_new_tokens - 1):
        following, _, cache = step(state, token, cache, np.int32(pos), *sampling)
        # The device is already busy with the next token while the caller looks at this one.
        yield np.asarray(token)
        token = following
        timings.steps, timings.decode = timings.steps + 1, time.perf_counter() - clock
    yield np.asarray(token)
    timings.decode = time.perf_counter() - clock


def check_request(config: DecoderConfig, prompt: Sequence[int], dtype: np.dtype, **options: Any) -> None:
    """Raise ``UsageError`` unless ``generate`` can do this.

    The options are in their ranges, ``prompt`` is of the vocabulary and not empty, it and the new tokens fit the model's
    context, and their cache in ``dtype`` fits in memory.
    """
    for name, value in options.items():
        try:
            OPTIONS[name](value)
        except ValueError:
            raise UsageError(wrong(name, value, OPTIONS[name])) from None
    if not len(prompt):
        raise UsageError("the prompt has no tokens")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise UsageError(f"the prompt has tokens outside of the model's vocabulary of {config.vocab_size}")
    new, batch = options["max_new_tokens"], options["batch"]
    if len(prompt) + new > config.max_len:
        raise UsageError(f"{len(prompt)} prompt tokens and {new} new ones exceed the context of {config.max_len}")
    slots = _slots(len(prompt) + new)
    size = 2 * config.num_layers * batch * slots * config.num_kv_heads * config.head_dim * dtype.itemsize
    require_memory(size, f"the cache of {batch} sequences of {slots} tokens", UsageError)


def _slots(tokens: int) -> int:
    """Length of the cache: whole blocks of a prefill."""
    return -(-tokens // PREFILL_BLOCK) * PREFILL_BLOCK


def choose_implementation(name: str) -> tuple[Wrapper, str]:
    """How to wrap the decode step, and what to call it in the summary.

    ``jit`` is plain ``jax.jit``. ``auto`` is ``none`` where jax_mpk can be imported and ``jit`` elsewhere, which it
    says in one line. Everything else is passed to ``jax_mpk.megakernelize``, where ``none`` means its own choice.
    """
    if name == "jit":
        return lambda step: step, "jax.jit"
    try:
        from jax_mpk import megakernelize
    except ImportError as error:
        if name != "auto":
            raise ModelError(f"--implementation {name} needs jax_mpk: {error}") from error
        print(f"jax_mpk cannot be imported ({error}): running jax.jit", file=sys.stderr)
        return lambda step: step, "jax.jit"
    implementation = None if name in ("auto", "none") else name
    return partial(megakernelize, implementation=implementation), f"megakernelize(implementation={implementation!r})"


class TokenIds:
    """Stands in for a ``StreamDecoder`` where there is no tokenizer: random weights."""

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


class Transcript:
    """The texts of all sequences. The first is printed as it grows, the others at the end.

    Args:
      streams: a decoder for each sequence.
      prompt: what each of them begins with.
    """

    def __init__(self, streams: Sequence[StreamDecoder | TokenIds], prompt: str, eos: Sequence[int]):
        self.streams, self.prompt, self.eos = streams, prompt, eos
        self.rows, self.ended = [""] * len(streams), np.zeros(len(streams), bool)
        self.made = 0
        print(prompt, end="", flush=True)

    def push(self, tokens: np.ndarray) -> None:
        """Add a token to each sequence that has not ended."""
        for row, token in enumerate(tokens):
            self.ended[row] |= token in self.eos
            if not self.ended[row]:
                self._show(row, self.streams[row].push(int(token)))
                self.made += 1

    def finish(self) -> None:
        """Print what is held back, and the sequences that have not been shown."""
        for row, stream in enumerate(self.streams):
            self._show(row, stream.flush())
        print()
        for row in range(1, len(self.rows)):
            print(f"\n--- sequence {row + 1} of {len(self.rows)}\n{self.prompt}{self.rows[row]}")

    def _show(self, row: int, text: str) -> None:
        self.rows[row] += text
        if row == 0:
            print(text, end="", flush=True)


def run(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """What the command does.

    Args:
      interrupt: Ctrl-C while tokens are made ends the text early, with one line in place of the summary.

    Raises:
      ModelError: as the command reports it, a ``UsageError`` where it is the command that is wrong.
    """
    if args.model is not None and args.model not in registry.PRESETS:
        raise UsageError(f"no model is called {shown(args.model)}; there are {', '.join(registry.PRESETS)}")
    wrap, ran = choose_implementation(args.implementation)
    if sys.modules.get("jax_mpk"):
        _check_knobs()
    try:
        device = jax.devices()[0]
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not there
        raise ModelError(str(error)) from error
    with _failures_named():
        _run(args, interrupt, wrap, ran, device)


def _check_knobs() -> None:
    """Raise ``UsageError`` for a JAX_MPK variable that would be a plain error in the middle of tracing."""
    from jax_mpk.options import from_environment

    try:
        from_environment()
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _run(args: argparse.Namespace, interrupt: Interrupt, wrap: Wrapper, ran: str, device: jax.Device) -> None:
    # Whatever can be refused is refused before the weights are loaded.
    source, dtype = (
        registry.resolve(args.model, seed=args.weights_seed, checkpoint=args.checkpoint),
        jnp.dtype(args.dtype),
    )
    directory, config = source.checkpoint, source.config
    # Random weights have no words of their own: the demo's tokenizer reads the prompt, and ids are printed.
    tokenizer = load_tokenizer(directory or registry.DEMO)
    if directory:
        check_vocabulary(tokenizer, config.vocab_size)
    ids = [token % config.vocab_size for token in encode(tokenizer, args.prompt)]
    options = {name: getattr(args, name) for name in OPTIONS}
    check_request(config, ids, dtype, **options)

    with _progress("loading", DownloadColumn(binary_units=True)) as advance:
        model, _ = registry.load(
            args.model, dtype=dtype, seed=args.weights_seed, checkpoint=args.checkpoint, progress=advance
        )
    timings = Timings()
    with _progress("compiling and reading the prompt", MofNCompleteColumn()) as advance:
        tokens = generate(
            model, ids, **options, wrap=wrap, on_prefill=lambda done: advance(done, len(ids)), timings=timings
        )
        first = next(tokens, None)
    streams = [StreamDecoder(tokenizer) if directory else TokenIds() for _ in range(args.batch)]
    interrupt.graceful = True
    transcript = Transcript(streams, args.prompt, config.eos_token_ids)
    while first is not None and not transcript.ended.all() and not interrupt.requested:
        transcript.push(first)
        first = next(tokens, None)
    transcript.finish()

    if interrupt.requested:
        print(f"interrupted after {transcript.made} new tokens", file=sys.stderr)
        return
    megabytes, rate = num_bytes(model) / 1e6, timings.steps * args.batch / timings.decode if timings.steps else 0.0
    print(
        f"\n{args.model or directory}, {megabytes:,.1f} MB of {dtype.name}{'' if directory else ' at random'}; "
        f"decode by {ran} on {device.device_kind}; compiled in {timings.compile:.1f} s\n"
        f"prompt: {len(ids)} tokens in {timings.prefill:.2f} s (jax.jit); "
        f"{transcript.made} new tokens, {rate:,.1f} tokens/s at batch {args.batch}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _progress(what: str, count: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal; gives ``advance(done, total)``."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """Turn what a device, a backend or a lack of memory does into a ``ModelError``. A bug keeps its traceback."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        raise ModelError(str(error) or "out of memory") from error
    except Exception as error:
        mpk = sys.modules.get("jax_mpk")
        if mpk is not None and isinstance(error, (mpk.UnsupportedError, mpk.ExecutionError)):
            raise ModelError(str(error)) from error
        raise
