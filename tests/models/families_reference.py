"""Independent references of the families beyond Llama and Qwen3: plain NumPy in float64, without a cache.

Nothing here is shared with ``models``. Formulas are the published ones in the published form: keys repeated per query head,
rotation by a rotated half, a mask that is made for each pair of positions, experts that are gone through one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

_BASE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    hidden_act="silu",
)
MISTRAL = _BASE | dict(model_type="mistral", sliding_window=7, tie_word_embeddings=False)
QWEN2 = _BASE | dict(model_type="qwen2", use_sliding_window=False, sliding_window=7)

GPT2 = dict(
    model_type="gpt2",
    vocab_size=96,
    n_embd=48,
    n_layer=2,
    n_head=6,
    n_positions=30,
    layer_norm_epsilon=1e-5,
    activation_function="gelu_new",
)

GEMMA2 = {key: value for key, value in _BASE.items() if key not in ("hidden_act", "tie_word_embeddings")} | dict(
    model_type="gemma2",
    num_hidden_layers=3,  # local, global, local
    hidden_activation="gelu_pytorch_tanh",
    sliding_window=7,
    query_pre_attn_scalar=11,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=1.5,
)
GEMMA3 = GEMMA2 | dict(
    model_type="gemma3_text",
    sliding_window_pattern=3,  # local, local, global
    rope_theta=100_000.0,
    rope_local_base_freq=100.0,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)

QWEN3_MOE = _BASE | dict(
    model_type="qwen3_moe",
    moe_intermediate_size=40,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    tie_word_embeddings=False,
)


def random_tensors(hf: dict[str, Any], seed: int = 0) -> Tensors:
    """float32 tensors under the names and in the layouts of a Hugging Face checkpoint."""
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:  # norms and biases alike: away from what leaving them out would do
            return rng.uniform(0.4, 1.4, shape).astype(np.float32)
        return (rng.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)

    return {name: drawn(shape) for name, shape in shapes(hf).items()}


def shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name of every tensor of a checkpoint, and its shape."""
    if hf["model_type"] == "gpt2":
        return _gpt2_shapes(hf)
    hidden, ffn, vocab = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    q, kv = (hf[key] * hf["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    result = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not hf.get("tie_word_embeddings", True):
        result["lm_head.weight"] = (vocab, hidden)
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if hf["model_type"] == "qwen2":
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", q), ("k", kv), ("v", kv))}
    if hf["model_type"].startswith("gemma"):
        layer |= {f"{side}_feedforward_layernorm.weight": (hidden,) for side in ("pre", "post")}
    if hf["model_type"] == "qwen3_moe":
        layer = {name: shape for name, shape in layer.items() if not name.startswith("mlp.")} | _experts_shapes(hf)
    if hf["model_type"] in ("gemma3_text", "qwen3_moe"):
        layer |= {f"self_attn.{part}_norm.weight": (hf["head_dim"],) for part in ("q", "k")}
    return result | {
        f"model.layers.{index}.{name}": shape
        for index in range(hf["num_hidden_layers"])
        for name, shape in layer.items()
    }


def _experts_shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = hf["hidden_size"], hf["moe_intermediate_size"]
    result = {"mlp.gate.weight": (hf["num_experts"], hidden)}
    for expert in range(hf["num_experts"]):
        result |= {f"mlp.experts.{expert}.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        result[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, ffn)
    return result


def _gpt2_shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = hf["n_embd"]
    layer = {"ln_1": (hidden,), "ln_2": (hidden,)}
    layer |= {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    layer |= {"mlp.c_fc": (hidden, 4 * hidden), "mlp.c_proj": (4 * hidden, hidden)}
    parts = {f"h.{index}.{name}": shape for index in range(hf["n_layer"]) for name, shape in layer.items()}
    parts["ln_f"] = (hidden,)
    result = {"wte.weight": (hf["vocab_size"], hidden), "wpe.weight": (hf["n_positions"], hidden)}
    for name, shape in parts.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return result


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """The approximation by ``tanh``."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """``x``, ``[B, H, T, D]``, turned by the angles of its positions."""
    dim = x.shape[-1]
    angles = np.arange(x.shape[2])[:, None] * theta ** (-2 * np.arange(dim // 2) / dim)
    angles = np.concatenate([angles, angles], axis=-1)
    half = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], axis=-1)
    return x * np.cos(angles) + half * np.sin(angles)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None, cap: float | None = None):
    """Causal attention of ``[B, H, T, D]`` over ``[B, Hkv, T, D]``, concatenated over heads: ``[B, T, H * D]``."""
    batch, heads, length, dim = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = scale * (q @ k.transpose(0, 1, 3, 2))
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    for i in range(length):
        for j in range(length):
            if j > i or (window is not None and i - j >= window):
                scores[:, :, i, j] = -np.inf
    return (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, heads * dim)


def heads_of(x: np.ndarray, dim: int) -> np.ndarray:
    """``[B, T, H * D]`` to ``[B, H, T, D]``."""
    return x.reshape(*x.shape[:2], -1, dim).transpose(0, 2, 1, 3)


def logits(hf: dict[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, T, V]`` of ``tokens`` ``[B, T]``, in float64."""
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    models = {"gpt2": _gpt2, "gemma2": _gemma, "gemma3_text": _gemma}
    return models.get(hf["model_type"], _llama_like)(hf, weights, tokens)


def _llama_like(hf: dict[str, Any], w: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Mistral, Qwen2, and Qwen3 with a mixture of experts."""
    eps, dim = hf["rms_norm_eps"], hf["head_dim"]
    window = hf["sliding_window"] if hf["model_type"] == "mistral" else None
    hidden = w["model.embed_tokens.weight"][tokens]
    for index in range(hf["num_hidden_layers"]):
        prefix = f"model.layers.{index}."

        def linear(x, name, prefix=prefix):
            return x @ w[f"{prefix}{name}.weight"].T + w.get(f"{prefix}{name}.bias", 0.0)

        x = rms_norm(hidden, w[prefix + "input_layernorm.weight"], eps)
        q, k, v = (heads_of(linear(x, f"self_attn.{part}_proj"), dim) for part in "qkv")
        if hf["model_type"] == "qwen3_moe":
            q, k = (rms_norm(x, w[f"{prefix}self_attn.{part}_norm.weight"], eps) for part, x in (("q", q), ("k", k)))
        q, k = rotate(q, hf["rope_theta"]), rotate(k, hf["rope_theta"])
        hidden = hidden + linear(attend(q, k, v, dim**-0.5, window), "self_attn.o_proj")
        x = rms_norm(hidden, w[prefix + "post_attention_layernorm.weight"], eps)
        if hf["model_type"] == "qwen3_moe":
            hidden = hidden + experts(hf, w, prefix + "mlp.", x)
        else:
            hidden = hidden + linear(silu(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj"), "mlp.down_proj")
    hidden = rms_norm(hidden, w["model.norm.weight"], eps)
    return hidden @ w["model.embed_tokens.weight" if hf["tie_word_embeddings"] else "lm_head.weight"].T


def experts(hf: dict[str, Any], w: Tensors, prefix: str, x: np.ndarray) -> np.ndarray:
    """A mixture of experts for ``x`` (``[..., hidden]``), one row and one expert at a time."""
    rows = x.reshape(-1, x.shape[-1])
    result = np.zeros_like(rows)
    for i, row in enumerate(rows):
        scores = softmax(w[prefix + "gate.weight"] @ row)
        best = sorted(range(hf["num_experts"]), key=lambda expert: -scores[expert])[: hf["num_experts_per_tok"]]  # noqa: B023
        total = sum(scores[best]) if hf["norm_topk_prob"] else 1.0
        for expert in best:
            gate, up, down = (w[f"{prefix}experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            result[i] += scores[expert] / total * (down @ (silu(gate @ row) * (up @ row)))
    return result.reshape(x.shape)


def _gpt2(hf: dict[str, Any], w: Tensors, tokens: np.ndarray) -> np.ndarray:
    heads, hidden = hf["n_head"], hf["n_embd"]
    dim = hidden // heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + hf["layer_norm_epsilon"])
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
    for index in range(hf["n_layer"]):
        h = f"h.{index}."
        q, k, v = np.split(linear(norm(x, h + "ln_1"), h + "attn.c_attn"), 3, axis=-1)
        mixed = attend(heads_of(q, dim), heads_of(k, dim), heads_of(v, dim), dim**-0.5, None)
        x = x + linear(mixed, h + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def _gemma(hf: dict[str, Any], w: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Gemma 2 and 3: which layers are local is written out."""
    third = hf["model_type"] == "gemma3_text"
    local = [True, True, False] if third else [True, False, True]
    embedding = w["model.embed_tokens.weight"]
    hidden = embedding[tokens] * np.sqrt(hf["hidden_size"])
    for index in range(hf["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        window = hf["sliding_window"] if local[index] else None
        theta = hf["rope_local_base_freq"] if third and local[index] else hf["rope_theta"]

        def norm(x, name, prefix=prefix):
            return rms_norm(x, 1 + w[f"{prefix}{name}.weight"], hf["rms_norm_eps"])

        def linear(x, name, prefix=prefix):
            return x @ w[f"{prefix}{name}.weight"].T

        x = norm(hidden, "input_layernorm")
        q, k, v = (heads_of(linear(x, f"self_attn.{part}_proj"), hf["head_dim"]) for part in "qkv")
        if third:
            q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
        scale, cap = 1 / np.sqrt(hf["query_pre_attn_scalar"]), hf["attn_logit_softcapping"]
        mixed = attend(rotate(q, theta), rotate(k, theta), v, scale, window, cap)
        hidden = hidden + norm(linear(mixed, "self_attn.o_proj"), "post_attention_layernorm")
        x = norm(hidden, "pre_feedforward_layernorm")
        x = linear(gelu(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj"), "mlp.down_proj")
        hidden = hidden + norm(x, "post_feedforward_layernorm")
    result = rms_norm(hidden, 1 + w["model.norm.weight"], hf["rms_norm_eps"]) @ embedding.T
    cap = hf["final_logit_softcapping"]
    return result if cap is None else cap * np.tanh(result / cap)
