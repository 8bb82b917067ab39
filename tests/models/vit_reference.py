"""An independent ViT in float64 NumPy, reading Hugging Face names and layouts. It shares nothing with ``models``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.bert_reference import Weights, attention, doubles, gelu, layer_norm

VIT = dict(
    model_type="vit",
    architectures=["ViTForImageClassification"],
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    hidden_act="gelu",
    image_size=24,
    patch_size=8,
    num_channels=3,
    id2label={str(i): f"kind {i}" for i in range(10)},
    qkv_bias=True,
    layer_norm_eps=1e-12,
)


def random_tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under the names and in the layouts of a Hugging Face checkpoint."""
    weights, hidden, ffn = Weights(seed), hf["hidden_size"], hf["intermediate_size"]
    channels, patch = hf["num_channels"], hf["patch_size"]
    patches = (hf["image_size"] // patch) ** 2
    weights.matrix("vit.embeddings.patch_embeddings.projection", hidden, channels * patch * patch)
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weights.tensors[name] = weights.tensors[name].reshape(hidden, channels, patch, patch)
    weights.tensors["vit.embeddings.cls_token"] = weights.rng.normal(size=(1, 1, hidden)).astype(np.float32)
    positions = weights.rng.normal(size=(1, patches + 1, hidden)).astype(np.float32)
    weights.tensors["vit.embeddings.position_embeddings"] = positions
    for index in range(hf["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{index}."
        for name in ("query", "key", "value"):
            weights.matrix(f"{layer}attention.attention.{name}", hidden, hidden, bias=hf["qkv_bias"])
        weights.matrix(f"{layer}attention.output.dense", hidden, hidden)
        weights.matrix(f"{layer}intermediate.dense", ffn, hidden)
        weights.matrix(f"{layer}output.dense", hidden, ffn)
        weights.norm(f"{layer}layernorm_before", hidden)
        weights.norm(f"{layer}layernorm_after", hidden)
    weights.norm("vit.layernorm", hidden)
    weights.matrix("classifier", len(hf["id2label"]), hidden)
    return weights.tensors


def logits(hf: dict[str, Any], tensors: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Logits ``[B, labels]`` of ``pixels`` ``[B, channels, height, width]``."""
    weights = doubles(tensors)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], hf["layer_norm_eps"])

    patch, rows = hf["patch_size"], []
    kernel = weights["vit.embeddings.patch_embeddings.projection.weight"]
    for top in range(0, hf["image_size"], patch):
        for left in range(0, hf["image_size"], patch):
            piece = pixels[:, :, top : top + patch, left : left + patch]
            rows.append(np.tensordot(piece, kernel, ([1, 2, 3], [1, 2, 3])))
    x = np.stack(rows, axis=1) + weights["vit.embeddings.patch_embeddings.projection.bias"]
    x = np.concatenate([np.repeat(weights["vit.embeddings.cls_token"], len(x), axis=0), x], axis=1)
    x = x + weights["vit.embeddings.position_embeddings"]
    for index in range(hf["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{index}."
        y = norm(x, f"{layer}layernorm_before")
        q, k, v = (linear(y, f"{layer}attention.attention.{name}") for name in ("query", "key", "value"))
        x = x + linear(attention(q, k, v, hf["num_attention_heads"]), f"{layer}attention.output.dense")
        y = norm(x, f"{layer}layernorm_after")
        x = x + linear(gelu(linear(y, f"{layer}intermediate.dense")), f"{layer}output.dense")
    return linear(norm(x, "vit.layernorm")[:, 0], "classifier")
