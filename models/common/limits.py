"""Every bound on a size or number that comes from outside: several times what real models have, and none that hangs.

The largest dense decoders published by 2025 have 126 layers, 128 heads, 405 billion parameters, vocabularies of 262,144
and contexts of 10 million positions. What a machine has memory for is checked apart, by ``models.common.memory``.
"""

from __future__ import annotations

from models.common.fields import Integer, Real

VOCABULARY = 1 << 22
HIDDEN = 1 << 17
INTERMEDIATE = 1 << 20
LAYERS = 512
HEADS = 1024
HEAD_DIM = 1024
EXPERTS = 4096
CONTEXT = 1 << 24  # positions are int32, and float32 holds each of these exactly
PARAMETERS = 1 << 42

JSON_BYTES = 1 << 26  # of config.json, of an index, and of the header of a safetensors file
TOKENIZER_BYTES = 1 << 28

SEED = Integer(0, (1 << 32) - 1)  # a key of JAX holds 32 bits of its seed, unless 64-bit types are enabled
BATCH = Integer(1, 1024)
NEW_TOKENS = Integer(0, CONTEXT)
TEMPERATURE = Real(1e-4, 1e4, or_zero=True)  # logits divided by it stay finite in float32
