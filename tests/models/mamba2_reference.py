"""An independent Mamba-2 in float64 NumPy: the recurrence as it is defined, one position after the other.

It reads Hugging Face names and layouts and shares nothing with ``models``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.bert_reference import Weights, doubles

MAMBA2 = dict(
    model_type="mamba2",
    architectures=["Mamba2ForCausalLM"],
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=16,
    state_size=8,
    n_groups=2,
    expand=2,
    conv_kernel=4,
    chunk_size=8,
    layer_norm_epsilon=1e-5,
    hidden_act="silu",
    use_bias=True,
    use_conv_bias=True,
    residual_in_fp32=True,
    time_step_limit=[0.01, 0.4],  # so that some steps are clipped on either side
    tie_word_embeddings=False,
)
PLAIN = MAMBA2 | dict(use_bias=False, use_conv_bias=False, tie_word_embeddings=True, n_groups=1, num_hidden_layers=1)
PLAIN["time_step_limit"] = [0.0, {"__float__": "Infinity"}]


def random_tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under the names and in the layouts of a Hugging Face checkpoint."""
    weights, hidden, heads = Weights(seed), hf["hidden_size"], hf["num_heads"]
    inner, state = heads * hf["head_dim"], hf["n_groups"] * hf["state_size"]
    width, tensors = inner + 2 * state, weights.tensors

    def scale(name: str, size: int) -> None:
        tensors[name] = weights.rng.uniform(0.5, 1.5, size).astype(np.float32)

    weights.matrix("backbone.embeddings", hf["vocab_size"], hidden, bias=False)
    scale("backbone.norm_f.weight", hidden)
    if not hf["tie_word_embeddings"]:
        weights.matrix("lm_head", hf["vocab_size"], hidden, bias=False)
    for index in range(hf["num_hidden_layers"]):
        layer = f"backbone.layers.{index}."
        scale(f"{layer}norm.weight", hidden)
        scale(f"{layer}mixer.norm.weight", inner)
        scale(f"{layer}mixer.D", heads)
        tensors[f"{layer}mixer.A_log"] = np.log(weights.rng.uniform(0.3, 4, heads)).astype(np.float32)
        tensors[f"{layer}mixer.dt_bias"] = weights.rng.uniform(-4, 0, heads).astype(np.float32)
        weights.matrix(f"{layer}mixer.in_proj", inner + width + heads, hidden, bias=hf["use_bias"])
        weights.matrix(f"{layer}mixer.out_proj", hidden, inner, bias=hf["use_bias"])
        weights.matrix(f"{layer}mixer.conv1d", width, hf["conv_kernel"], bias=hf["use_conv_bias"])
        tensors[f"{layer}mixer.conv1d.weight"] = tensors[f"{layer}mixer.conv1d.weight"][:, None]
    return tensors


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def logits(
    hf: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Logits ``[B, T, V]`` of ``tokens`` ``[B, T]``, and each layer's last state ``[B, H, P, N]`` and convolved inputs."""
    weights = doubles(tensors)
    batch, length = tokens.shape
    heads, dim, groups, size = hf["num_heads"], hf["head_dim"], hf["n_groups"], hf["state_size"]
    inner, taps = heads * dim, hf["conv_kernel"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def rms(x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + hf["layer_norm_epsilon"])

    low, high = (np.inf if isinstance(x, dict) else x for x in hf["time_step_limit"])
    stream, ends = weights["backbone.embeddings.weight"][tokens], []
    for index in range(hf["num_hidden_layers"]):
        layer = f"backbone.layers.{index}."
        mixer = f"{layer}mixer."
        projected = linear(rms(stream) * weights[f"{layer}norm.weight"], f"{mixer}in_proj")
        kernel = weights[f"{mixer}conv1d.weight"][:, 0]
        rate = -np.exp(weights[f"{mixer}A_log"])
        state, past = np.zeros((batch, heads, dim, size)), np.zeros((batch, taps, inner + 2 * groups * size))
        outputs = []
        for t in range(length):
            z = projected[:, t, :inner]
            past = np.concatenate([past[:, 1:], projected[:, t, None, inner:-heads]], axis=1)
            mixed = silu(np.einsum("bkc,ck->bc", past, kernel) + weights.get(f"{mixer}conv1d.bias", 0))
            x = mixed[:, :inner].reshape(batch, heads, dim)
            b, c = (
                np.repeat(part.reshape(batch, groups, size), heads // groups, axis=1)
                for part in np.split(mixed[:, inner:], 2, axis=-1)
            )
            dt = np.clip(np.logaddexp(0, projected[:, t, -heads:] + weights[f"{mixer}dt_bias"]), low, high)
            state = np.exp(dt * rate)[..., None, None] * state + np.einsum("bh,bhp,bhn->bhpn", dt, x, b)
            y = np.einsum("bhpn,bhn->bhp", state, c) + weights[f"{mixer}D"][:, None] * x
            y = y.reshape(batch, inner) * silu(z)
            y = rms(y.reshape(batch, groups, -1)).reshape(batch, inner) * weights[f"{mixer}norm.weight"]
            outputs.append(linear(y, f"{mixer}out_proj"))
        stream = stream + np.stack(outputs, axis=1)
        ends.append(dict(conv=past[:, 1:], ssm=state))
    head = "backbone.embeddings.weight" if hf["tie_word_embeddings"] else "lm_head.weight"
    return rms(stream) * weights["backbone.norm_f.weight"] @ weights[head].T, ends
