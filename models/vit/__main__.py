"""Classify an image of noise: ``python -m models.vit --model vit-tiny``; with ``--checkpoint``, by its weights.

Prints the likeliest labels. Exit status: 0, or 1 for a failure and 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from models.common.errors import ModelError, UsageError
from models.generation import choose_implementation
from models.vit import PRESETS, from_pretrained, random_model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.vit", description="Classify an image of noise.")
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="vit-tiny", help="a shape, with random weights")
    add("--checkpoint", type=Path, help="with config.json and safetensors, instead of a shape")
    add("--implementation", choices=["auto", "none", "cpu", "cuda", "xla", "jit"], default="auto")
    add("--dtype", choices=["bfloat16", "float32"], default="float32")
    return parser.parse_args(argv)


def classify(args: argparse.Namespace) -> np.ndarray:
    """Probability of each label, float32 ``[num_labels]``, for an image that is the same every time."""
    wrap, _ = choose_implementation(args.implementation)
    dtype = jnp.dtype(args.dtype)
    if args.checkpoint is None:
        model, params = random_model(PRESETS[args.model](), dtype=dtype)
    else:
        model, params = from_pretrained(args.checkpoint, dtype=dtype)
    side, channels = model.config.image_size, model.config.num_channels
    pixels = np.random.default_rng(0).normal(size=(1, side, side, channels)).astype(np.float32)
    logits = jax.jit(wrap(lambda params, pixels: model.apply({"params": params}, pixels)))(params, pixels)
    return np.asarray(jax.nn.softmax(logits[0]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse(argv)
    try:
        probabilities = classify(args)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for label in np.argsort(-probabilities)[:5]:
        print(f"{probabilities[label]:.4f}  label {label}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
