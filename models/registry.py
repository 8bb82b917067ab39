"""Models by name: ``load("qwen3-0.6b")``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from models import gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3, qwen3_moe
from models.common import limits
from models.common.checkpoint import CONFIG, load_config, read_config
from models.common.config import DecoderConfig
from models.common.decoder import Decoder
from models.common.errors import ConfigError
from models.common.fields import Field, OneOf, plain, read, wrong
from models.common.initialize import random_model

DEMO = Path(__file__).parent / "demo"


class Family(NamedTuple):
    """What a model family provides."""

    model: type[Decoder]
    config: type[DecoderConfig]
    from_pretrained: Callable[..., Decoder]


FAMILIES = {
    "gemma2": Family(gemma2.Gemma2, gemma2.Gemma2Config, gemma2.from_pretrained),
    "gemma3_text": Family(gemma3.Gemma3, gemma3.Gemma3Config, gemma3.from_pretrained),
    "gpt2": Family(gpt2.GPT2, gpt2.GPT2Config, gpt2.from_pretrained),
    "llama": Family(llama.Llama, llama.LlamaConfig, llama.from_pretrained),
    "mistral": Family(mistral.Mistral, mistral.MistralConfig, mistral.from_pretrained),
    "qwen2": Family(qwen2.Qwen2, qwen2.Qwen2Config, qwen2.from_pretrained),
    "qwen3": Family(qwen3.Qwen3, qwen3.Qwen3Config, qwen3.from_pretrained),
    "qwen3_moe": Family(qwen3_moe.Qwen3Moe, qwen3_moe.Qwen3MoeConfig, qwen3_moe.from_pretrained),
}
"""By the ``model_type`` of a ``config.json``."""

PRESETS = {
    "gemma-2-2b": ("gemma2", gemma2.Gemma2Config.gemma_2_2b),
    "gemma2-tiny": ("gemma2", gemma2.Gemma2Config.tiny),
    "gemma-3-1b": ("gemma3_text", gemma3.Gemma3Config.gemma_3_1b),
    "gemma3-tiny": ("gemma3_text", gemma3.Gemma3Config.tiny),
    "gpt2": ("gpt2", gpt2.GPT2Config.gpt2),
    "gpt2-medium": ("gpt2", gpt2.GPT2Config.gpt2_medium),
    "gpt2-tiny": ("gpt2", gpt2.GPT2Config.tiny),
    "llama-3.2-1b": ("llama", llama.LlamaConfig.llama_3_2_1b),
    "llama-3.2-3b": ("llama", llama.LlamaConfig.llama_3_2_3b),
    "llama-tiny": ("llama", llama.LlamaConfig.tiny),
    "mistral-7b": ("mistral", mistral.MistralConfig.mistral_7b),
    "mistral-tiny": ("mistral", mistral.MistralConfig.tiny),
    "qwen2.5-0.5b": ("qwen2", qwen2.Qwen2Config.qwen2_5_0_5b),
    "qwen2.5-1.5b": ("qwen2", qwen2.Qwen2Config.qwen2_5_1_5b),
    "qwen2.5-7b": ("qwen2", qwen2.Qwen2Config.qwen2_5_7b),
    "qwen2-tiny": ("qwen2", qwen2.Qwen2Config.tiny),
    "qwen3-130m": ("qwen3", qwen3.Qwen3Config.qwen3_130m),
    "qwen3-0.6b": ("qwen3", qwen3.Qwen3Config.qwen3_0_6b),
    "qwen3-1.7b": ("qwen3", qwen3.Qwen3Config.qwen3_1_7b),
    "qwen3-4b": ("qwen3", qwen3.Qwen3Config.qwen3_4b),
    "qwen3-8b": ("qwen3", qwen3.Qwen3Config.qwen3_8b),
    "qwen3-tiny": ("qwen3", qwen3.Qwen3Config.tiny),
    "qwen3-30b-a3b": ("qwen3_moe", qwen3_moe.Qwen3MoeConfig.qwen3_30b_a3b),
    "qwen3-moe-tiny": ("qwen3_moe", qwen3_moe.Qwen3MoeConfig.tiny),
    "demo": ("qwen3", qwen3.Qwen3Config.demo),
}


def preset(name: str, **changes: object) -> tuple[type[Decoder], DecoderConfig]:
    """The class of the model that is called ``name``, and its configuration with ``changes`` (``num_layers=4``).

    Raises:
      ConfigError: there is no such name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no model is called '{name}'; there are {', '.join(PRESETS)}")
    family, config = PRESETS[name]
    return FAMILIES[family].model, config().replace(**changes)


class Source(NamedTuple):
    """What ``load`` would load: a family, its configuration, and a checkpoint directory or else a seed."""

    family: Family
    config: DecoderConfig
    checkpoint: Path | None
    seed: int


def resolve(name: str | None, *, seed: int | None = None, checkpoint: Path | str | None = None) -> Source:
    """What ``load`` would load with the same arguments, without its weights; raises what ``load`` raises before these."""
    if seed is not None and checkpoint is not None:
        raise ConfigError("give a seed for random weights or a checkpoint, not both")
    if name is None and checkpoint is None:
        raise ConfigError("without a name there must be a checkpoint")
    config = None if name is None else preset(name)[1]
    if name == "demo" and seed is None and checkpoint is None:
        checkpoint = DEMO
    if checkpoint is None:
        seed = 0 if seed is None else seed
        try:
            return Source(FAMILIES[config.model_type], config, None, limits.SEED(seed))
        except ValueError:
            raise ConfigError(wrong("the seed", seed, limits.SEED)) from None

    directory = Path(checkpoint)
    family = _family(directory) if config is None else FAMILIES[config.model_type]
    stored = load_config(family.config, directory)
    if config is not None:
        _check_shape(name, stored, config)
    return Source(family, stored, directory, 0)


def load(
    name: str | None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    seed: int | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Decoder, DecoderConfig]:
    """A model with weights, and its configuration.

    Args:
      name: one of ``PRESETS``. None takes family and shape from the ``config.json`` of ``checkpoint``.
      dtype: of parameters, activations and cache.
      seed: for random weights. With neither this nor ``checkpoint``, "demo" is its trained checkpoint and everything
        else is random with seed 0.
      checkpoint: directory with ``config.json`` and safetensors.
      progress: called as ``progress(bytes done, bytes in all)``.

    Raises:
      ConfigError: there is no such name, ``seed`` is out of range, ``seed`` and ``checkpoint`` are both given, or the
        ``config.json`` is unsupported or not of the shape that ``name`` stands for.
      CheckpointError: the checkpoint does not fit.
    """
    family, config, directory, seed = resolve(name, seed=seed, checkpoint=checkpoint)
    if directory is None:
        return random_model(family.model, config, dtype=dtype, seed=seed, progress=progress), config
    return family.from_pretrained(directory, config=config, dtype=dtype, progress=progress), config


def _family(directory: Path) -> Family:
    problems: list[str] = []
    found = read(read_config(directory), {"model_type": Field("model_type", OneOf(*FAMILIES))}, problems)
    if problems:
        raise ConfigError(f"{plain(directory / CONFIG)}: {problems[0]}")
    return FAMILIES[found["model_type"]]


def _check_shape(name: str, found: DecoderConfig, expected: DecoderConfig) -> None:
    for field in expected.shape_fields:
        if getattr(found, field) != getattr(expected, field):
            raise ConfigError(
                f"the checkpoint is not {name}: its {field} is {getattr(found, field)}, not {getattr(expected, field)}"
            )
