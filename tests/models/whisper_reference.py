"""An independent Whisper in float64 NumPy, without a cache, reading Hugging Face names and layouts.

It shares nothing with ``models``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.bert_reference import Weights, attention, doubles, gelu, layer_norm

WHISPER = dict(
    model_type="whisper",
    architectures=["WhisperForConditionalGeneration"],
    vocab_size=96,
    d_model=48,
    encoder_layers=1,
    encoder_attention_heads=4,
    encoder_ffn_dim=80,
    decoder_layers=2,
    decoder_attention_heads=6,
    decoder_ffn_dim=64,
    num_mel_bins=10,
    max_source_positions=12,
    max_target_positions=24,
    decoder_start_token_id=1,
    eos_token_id=2,
    activation_function="gelu",
    scale_embedding=False,
)


def random_tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under the names and in the layouts of a Hugging Face checkpoint."""
    weights, width = Weights(seed), hf["d_model"]
    for name, channels in (("conv1", hf["num_mel_bins"]), ("conv2", width)):
        weights.matrix(f"model.encoder.{name}", width, channels * 3)
        kernel = weights.tensors[f"model.encoder.{name}.weight"]
        weights.tensors[f"model.encoder.{name}.weight"] = kernel.reshape(width, channels, 3)
    weights.matrix("model.encoder.embed_positions", hf["max_source_positions"], width, bias=False)
    weights.matrix("model.decoder.embed_positions", hf["max_target_positions"], width, bias=False)
    weights.tensors["model.decoder.embed_positions.weight"] *= 30  # or it would say one token again and again
    weights.matrix("model.decoder.embed_tokens", hf["vocab_size"], width, bias=False)
    for side in ("encoder", "decoder"):
        weights.norm(f"model.{side}.layer_norm", width)
        for index in range(hf[f"{side}_layers"]):
            layer, ffn = f"model.{side}.layers.{index}.", hf[f"{side}_ffn_dim"]
            for kind in ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",):
                weights.norm(f"{layer}{kind}_layer_norm", width)
                for name in ("q", "k", "v", "out"):
                    weights.matrix(f"{layer}{kind}.{name}_proj", width, width, bias=name != "k")
            weights.norm(f"{layer}final_layer_norm", width)
            weights.matrix(f"{layer}fc1", ffn, width)
            weights.matrix(f"{layer}fc2", width, ffn)
    return weights.tensors


def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """``[B, F, C]`` by ``[out, C, 3]``, with a frame of zeros on either side."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    frames = range(0, x.shape[1], stride)
    return np.stack([np.einsum("bkc,ock->bo", padded[:, t : t + 3], kernel) + bias for t in frames], axis=1)


def run(
    hf: dict[str, Any], tensors: dict[str, np.ndarray], features: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The encoding ``[B, F / 2, D]`` of ``features`` ``[B, F, mel]``, and the logits ``[B, T, V]`` of ``tokens``."""
    weights = doubles(tensors)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def attend(x, other, name, heads, visible=None):
        q, k, v = (linear(part, f"{name}.{p}_proj") for p, part in (("q", x), ("k", other), ("v", other)))
        return linear(attention(q, k, v, heads, visible), f"{name}.out_proj")

    def feed(x, layer):
        y = gelu(linear(norm(x, f"{layer}final_layer_norm"), f"{layer}fc1"))
        return x + linear(y, f"{layer}fc2")

    x = features.astype(np.float64)
    for name, stride in (("conv1", 1), ("conv2", 2)):
        kernel, bias = weights[f"model.encoder.{name}.weight"], weights[f"model.encoder.{name}.bias"]
        x = gelu(convolve(x, kernel, bias, stride))
    x = x + weights["model.encoder.embed_positions.weight"]
    for index in range(hf["encoder_layers"]):
        layer = f"model.encoder.layers.{index}."
        y = norm(x, f"{layer}self_attn_layer_norm")
        x = feed(x + attend(y, y, f"{layer}self_attn", hf["encoder_attention_heads"]), layer)
    sound = norm(x, "model.encoder.layer_norm")

    length, heads = tokens.shape[1], hf["decoder_attention_heads"]
    x = weights["model.decoder.embed_tokens.weight"][tokens] + weights["model.decoder.embed_positions.weight"][:length]
    causal = np.tril(np.ones((length, length), bool))
    for index in range(hf["decoder_layers"]):
        layer = f"model.decoder.layers.{index}."
        y = norm(x, f"{layer}self_attn_layer_norm")
        x = x + attend(y, y, f"{layer}self_attn", heads, causal)
        y = norm(x, f"{layer}encoder_attn_layer_norm")
        x = feed(x + attend(y, sound, f"{layer}encoder_attn", heads), layer)
    return sound, norm(x, "model.decoder.layer_norm") @ weights["model.decoder.embed_tokens.weight"].T
