"""Generate text: ``python -m models.generate --model demo --prompt "It was a truth"``.

Text goes to standard output, progress and the summary to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models import registry
from models.common.checkpoint import CheckpointError
from models.common.config import ConfigError
from models.common.decoder import Decoder
from models.common.initialize import num_bytes
from models.common.tokenizer import StreamDecoder, TokenizerError, check_vocabulary, load_tokenizer
from models.decode import greedy_step, prefill, sample, sample_step

PREFILL_BLOCK = 64  # one compiled shape serves prompts of any length

Wrapper = Callable[[Callable], Callable]


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why."""


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
      prompt: token ids, at least one.
      temperature: 0 takes the likeliest token, so that all sequences are the same.
      seed: for sampling; the same seed gives the same tokens.
      wrap: applied to the decode step before ``jax.jit``.
      on_prefill: called with the number of prompt tokens done so far.

    Raises:
      UsageError: the prompt is empty, or prompt and new tokens do not fit the model's context.
    """
    timings = Timings() if timings is None else timings
    length = len(prompt)
    if not length:
        raise UsageError("the prompt has no tokens")
    if length + max_new_tokens > model.config.max_len:
        raise UsageError(
            f"{length} prompt tokens and {max_new_tokens} new ones exceed the context of {model.config.max_len}"
        )
    if max_new_tokens <= 0:
        return
    graphdef, state = nnx.split(model)
    slots = -(-(length + max_new_tokens) // PREFILL_BLOCK) * PREFILL_BLOCK
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
            raise UsageError(f"--implementation {name} needs jax_mpk: {error}") from error
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


def run(args: argparse.Namespace) -> None:
    """What the command does; see ``main`` for the errors that it reports in one line."""
    wrap, ran = choose_implementation(args.implementation)
    dtype = jnp.dtype(args.dtype)
    console = Console(stderr=True)
    trained = registry.DEMO if args.model == "demo" and args.weights_seed is None else None
    directory = args.checkpoint or trained
    # Random weights have no words of their own: the demo's tokenizer reads the prompt, and ids are printed.
    tokenizer = load_tokenizer(directory or registry.DEMO)

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading")
        model, config = registry.load(
            args.model,
            dtype=dtype,
            seed=args.weights_seed,
            checkpoint=args.checkpoint,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if directory:
        check_vocabulary(tokenizer, config.vocab_size)
    ids = [token % config.vocab_size for token in tokenizer.encode(args.prompt).ids]

    timings = Timings()
    streams = [StreamDecoder(tokenizer) if directory else TokenIds() for _ in range(args.batch)]
    rows, ended = [""] * args.batch, np.zeros(args.batch, bool)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("compiling and reading the prompt", total=len(ids))
    tokens = generate(
        model,
        ids,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        temperature=args.temperature,
        seed=args.seed,
        wrap=wrap,
        on_prefill=lambda done: bar.update(task, completed=done),
        timings=timings,
    )

    def show(row: int, text: str) -> None:
        rows[row] += text
        if row == 0:
            print(text, end="", flush=True)

    with bar:
        first = next(tokens, None)
    print(args.prompt, end="", flush=True)
    made = 0
    try:
        while first is not None and not ended.all():
            for row, token in enumerate(first):
                ended[row] |= token in config.eos_token_ids
                if not ended[row]:
                    show(row, streams[row].push(int(token)))
                    made += 1
            first = next(tokens, None)
    except KeyboardInterrupt:
        pass  # the summary is still true
    for row, stream in enumerate(streams):
        show(row, stream.flush())
    print()
    for row in range(1, args.batch):
        print(f"\n--- sequence {row + 1} of {args.batch}\n{args.prompt}{rows[row]}")

    megabytes, device = num_bytes(model) / 1e6, jax.devices()[0]
    rate = timings.steps * args.batch / timings.decode if timings.steps else 0.0
    print(
        f"\n{args.model or directory}, {megabytes:,.1f} MB of {dtype.name}{'' if directory else ' at random'}; "
        f"decode by {ran} on {device.device_kind}; compiled in {timings.compile:.1f} s\n"
        f"prompt: {len(ids)} tokens in {timings.prefill:.2f} s (jax.jit); "
        f"{made} new tokens, {rate:,.1f} tokens/s at batch {args.batch}",
        file=sys.stderr,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.generate", description="Generate text.")
    add = parser.add_argument
    add("--model", help=f"{', '.join(registry.PRESETS)}; default: the checkpoint's own, or demo")
    add("--checkpoint", type=Path, help="directory with config.json, tokenizer.json and safetensors")
    add("--weights-seed", type=int, help="random weights from this seed instead of a checkpoint")
    add("--prompt", default="It is a truth universally acknowledged, that")
    add("--max-new-tokens", type=int, default=128)
    add("--implementation", choices=["auto", "none", "cpu", "cuda", "xla", "jit"], default="auto")
    add("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    add("--seed", type=int, default=0, help="for sampling")
    add("--batch", type=int, default=1, help="independent sequences; the first is streamed")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.max_new_tokens < 0 or args.temperature < 0:
        parser.error("--batch must be positive, --max-new-tokens and --temperature must not be negative")
    if args.model is None and args.checkpoint is None:
        args.model = "demo"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. What a user can get wrong is one line on standard error."""
    args = parse(argv)
    try:
        run(args)
    except (CheckpointError, ConfigError, TokenizerError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
