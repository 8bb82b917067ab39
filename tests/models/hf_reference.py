"""An independent reference: decoders in plain NumPy, reading Hugging Face names and layouts, without a cache.

It shares nothing with ``models`` and takes its formulas from the published descriptions, in the published form: keys
repeated per query head, rotation by a rotated half, rope scaling by wavelength. Everything is float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    # Wavelengths of 6, 63, 628 and 6283 positions fall on both sides of these bounds (16 and 64) and between them.
    rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    max_position_embeddings=256,
    tie_word_embeddings=True,
    hidden_act="silu",
)
QWEN3 = LLAMA | dict(model_type="qwen3", head_dim=16, rms_norm_eps=1e-6, rope_scaling=None)


def random_tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under the names and in the layouts of a Hugging Face checkpoint."""
    rng = np.random.default_rng(seed)
    hidden, ffn, dim = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    q, kv = hf["num_attention_heads"] * dim, hf["num_key_value_heads"] * dim

    def matrix(out: int, into: int) -> np.ndarray:
        return (rng.normal(size=(out, into)) / np.sqrt(into)).astype(np.float32)

    def scale(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(hf["vocab_size"], hidden), "model.norm.weight": scale(hidden)}
    if not hf["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(hf["vocab_size"], hidden)
    for layer in range(hf["num_hidden_layers"]):
        parts = {
            "input_layernorm": scale(hidden),
            "self_attn.q_proj": matrix(q, hidden),
            "self_attn.k_proj": matrix(kv, hidden),
            "self_attn.v_proj": matrix(kv, hidden),
            "self_attn.o_proj": matrix(hidden, q),
            "post_attention_layernorm": scale(hidden),
            "mlp.gate_proj": matrix(ffn, hidden),
            "mlp.up_proj": matrix(ffn, hidden),
            "mlp.down_proj": matrix(hidden, ffn),
        }
        if hf["model_type"] == "qwen3":
            parts |= {"self_attn.q_norm": scale(dim), "self_attn.k_norm": scale(dim)}
        tensors |= {f"model.layers.{layer}.{name}.weight": value for name, value in parts.items()}
    return tensors


def write_checkpoint(directory: Path, hf: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Write a checkpoint directory without any code under test."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def inverse_frequencies(hf: dict[str, Any]) -> np.ndarray:
    """Rotary frequencies, scaled as Llama 3 describes it: by wavelength."""
    base = [hf["rope_theta"] ** (-2 * i / hf["head_dim"]) for i in range(hf["head_dim"] // 2)]
    scaling = hf["rope_scaling"]
    if scaling is None:
        return np.array(base)
    context, low, high = (
        scaling["original_max_position_embeddings"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
    )
    scaled = []
    for frequency in base:
        wavelength = 2 * np.pi / frequency
        if wavelength < context / high:
            scaled.append(frequency)
        elif wavelength > context / low:
            scaled.append(frequency / scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)
    return np.array(scaled)


def logits(hf: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, T, V]`` of ``tokens`` ``[B, T]``, in float64."""
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    batch, length = tokens.shape
    heads, kv_heads, dim = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + hf["rms_norm_eps"]) * weights[name]

    angles = np.arange(length)[:, None] * inverse_frequencies(hf)
    angles = np.concatenate([angles, angles], axis=-1)[None, None]  # [1, 1, T, dim]

    def rotate(x):
        half = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], axis=-1)
        return x * np.cos(angles) + half * np.sin(angles)

    hidden = weights["model.embed_tokens.weight"][tokens]
    for layer in range(hf["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        x = norm(hidden, prefix + "input_layernorm.weight")

        def project(x, name, count, prefix=prefix):
            return (x @ weights[f"{prefix}self_attn.{name}_proj.weight"].T).reshape(batch, length, count, dim)

        q, k, v = project(x, "q", heads), project(x, "k", kv_heads), project(x, "v", kv_heads)
        if hf["model_type"] == "qwen3":
            q, k = norm(q, prefix + "self_attn.q_norm.weight"), norm(k, prefix + "self_attn.k_norm.weight")
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = rotate(q) @ rotate(k).transpose(0, 1, 3, 2) / np.sqrt(dim)
        scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, heads * dim)
        hidden = hidden + mixed @ weights[prefix + "self_attn.o_proj.weight"].T
        x = norm(hidden, prefix + "post_attention_layernorm.weight")
        gate = x @ weights[prefix + "mlp.gate_proj.weight"].T
        up = x @ weights[prefix + "mlp.up_proj.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    hidden = norm(hidden, "model.norm.weight")
    head = "model.embed_tokens.weight" if hf["tie_word_embeddings"] else "lm_head.weight"
    return hidden @ weights[head].T
