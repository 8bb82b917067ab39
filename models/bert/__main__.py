"""Compare sentences: ``python -m models.bert "A cat sits." "A feline rests." --checkpoint path/to/all-MiniLM-L6-v2``.

Prints the cosine similarity of each pair. Exit status: 0, or 1 for a failure and 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.bert import batch_of, embed, from_pretrained
from models.common.errors import ModelError, UsageError
from models.common.tokenizer import check_vocabulary, load_tokenizer
from models.generation import choose_implementation


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.bert", description="Compare sentences.")
    add = parser.add_argument
    add("sentences", nargs="+", metavar="SENTENCE")
    add("--checkpoint", type=Path, required=True, help="with config.json, tokenizer.json and safetensors")
    add("--implementation", choices=["auto", "none", "cpu", "cuda", "xla", "jit"], default="auto")
    add("--dtype", choices=["bfloat16", "float32"], default="float32")
    return parser.parse_args(argv)


def similarities(args: argparse.Namespace) -> np.ndarray:
    """Cosines of all pairs of ``args.sentences``: float32 ``[N, N]``; raises ``ModelError``."""
    wrap, _ = choose_implementation(args.implementation)
    tokenizer = load_tokenizer(args.checkpoint)
    model = from_pretrained(args.checkpoint, dtype=jnp.dtype(args.dtype))
    check_vocabulary(tokenizer, model.config.vocab_size)
    tokens, mask = batch_of(tokenizer, args.sentences, model.config.max_len)
    graphdef, state = nnx.split(model)
    embeddings = np.asarray(jax.jit(wrap(partial(embed, graphdef)))(state, tokens, mask))
    return embeddings @ embeddings.T


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse(argv)
    try:
        cosines = similarities(args)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for i, one in enumerate(args.sentences):
        for j in range(i + 1, len(args.sentences)):
            print(f"{cosines[i, j]:+.6f}  {one!r}  {args.sentences[j]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
