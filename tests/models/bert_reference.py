"""An independent BERT in float64 NumPy, reading Hugging Face names and layouts. It shares nothing with ``models``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BERT = dict(
    model_type="bert",
    architectures=["BertModel"],
    vocab_size=96,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    hidden_act="gelu",
    max_position_embeddings=40,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of each element."""
    return np.vectorize(math.erf)(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """``x`` times the probability that a standard normal is less."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: float) -> np.ndarray:
    """Mean 0 and variance 1 over the last axis, then scaled and shifted."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + shift


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """``[B, T, C]`` as ``[B, heads, T, C / heads]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, visible: np.ndarray | None = None) -> np.ndarray:
    """Of projected ``[B, T, C]`` and ``[B, S, C]``; where ``visible`` (to ``[B, H, T, S]``) is false, no weight."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    out = softmax(scores) @ v
    return out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)


class Weights:
    """Random float32 tensors made on demand under checkpoint names, and float64 views of them."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def matrix(self, name: str, out: int, into: int, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = (self.rng.normal(size=(out, into)) / np.sqrt(into)).astype(np.float32)
        if bias:
            self.tensors[f"{name}.bias"] = self.rng.normal(size=out).astype(np.float32) * np.float32(0.3)

    def norm(self, name: str, size: int) -> None:
        self.tensors[f"{name}.weight"] = self.rng.uniform(0.5, 1.5, size).astype(np.float32)
        self.tensors[f"{name}.bias"] = self.rng.normal(size=size).astype(np.float32) * np.float32(0.3)


def doubles(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All of them as float64."""
    return {name: value.astype(np.float64) for name, value in tensors.items()}


def random_tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under the names and in the layouts of a Hugging Face checkpoint."""
    weights, hidden, ffn = Weights(seed), hf["hidden_size"], hf["intermediate_size"]
    for name, rows in (
        ("word", hf["vocab_size"]),
        ("position", hf["max_position_embeddings"]),
        ("token_type", hf["type_vocab_size"]),
    ):
        weights.matrix(f"embeddings.{name}_embeddings", rows, hidden, bias=False)
    weights.norm("embeddings.LayerNorm", hidden)
    for index in range(hf["num_hidden_layers"]):
        layer = f"encoder.layer.{index}."
        for name in ("query", "key", "value"):
            weights.matrix(f"{layer}attention.self.{name}", hidden, hidden)
        weights.matrix(f"{layer}attention.output.dense", hidden, hidden)
        weights.norm(f"{layer}attention.output.LayerNorm", hidden)
        weights.matrix(f"{layer}intermediate.dense", ffn, hidden)
        weights.matrix(f"{layer}output.dense", hidden, ffn)
        weights.norm(f"{layer}output.LayerNorm", hidden)
    weights.matrix("pooler.dense", hidden, hidden)
    return weights.tensors


def encode(
    hf: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states ``[B, T, C]`` and the pooled ``[B, C]`` of ``tokens``, ``mask`` and ``types`` ``[B, T]``."""
    weights = doubles(tensors)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], hf["layer_norm_eps"])

    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][np.arange(tokens.shape[1])]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][types], "embeddings.LayerNorm")
    visible = (mask != 0)[:, None, None, :]
    for index in range(hf["num_hidden_layers"]):
        layer = f"encoder.layer.{index}."
        q, k, v = (linear(x, f"{layer}attention.self.{name}") for name in ("query", "key", "value"))
        out = linear(attention(q, k, v, hf["num_attention_heads"], visible), f"{layer}attention.output.dense")
        x = norm(x + out, f"{layer}attention.output.LayerNorm")
        out = linear(gelu(linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
        x = norm(x + out, f"{layer}output.LayerNorm")
    return x, np.tanh(linear(x[:, 0], "pooler.dense"))


def embedding(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over what ``mask`` keeps, of length 1."""
    rows = [row[keep != 0].mean(0) for row, keep in zip(hidden, mask)]
    return np.array([row / np.linalg.norm(row) for row in rows])
