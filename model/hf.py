"""Our names and config in Hugging Face's terms, and back; the only place that knows them.

A model is a `LlamaForCausalLM`: same pairs in RoPE, same weights, nothing permuted. So is a Mistral without a sliding
window; a Qwen2 has biases besides, and is read alone.
"""

from typing import Any

import torch

from triplane.model.config import ModelConfig, RopeScaling
from triplane.model.errors import ModelError

_TO_HF = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wq.bias": "self_attn.q_proj.bias",
    "attention.wk.bias": "self_attn.k_proj.bias",
    "attention.wv.bias": "self_attn.v_proj.bias",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w_gate.weight": "mlp.gate_proj.weight",
    "feed_forward.w_up.weight": "mlp.up_proj.weight",
    "feed_forward.w_down.weight": "mlp.down_proj.weight",
}
_FROM_HF = {hf: ours for ours, hf in _TO_HF.items()}


def to_hf_name(name: str) -> str:
    """`blocks.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if not name.startswith("blocks."):
        return _TO_HF[name]
    _, number, rest = name.split(".", 2)
    return f"model.layers.{number}.{_TO_HF[rest]}"


def from_hf_name(name: str) -> str:
    """The inverse of `to_hf_name`; ModelError for a weight that our model does not have."""
    prefix, rest = "", name
    if name.startswith("model.layers."):
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        prefix = f"blocks.{number}."
    if rest not in _FROM_HF:
        raise ModelError(f"The weight {name} has no place in this model; only those of Llama, Mistral and Qwen2 have.")
    return prefix + _FROM_HF[rest]


def hf_config(
    config: ModelConfig, seq_len: int, bos_id: int | None, eos_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The content of config.json.

    RoPE and dtype stand there twice: as transformers 5 names them, and as 4 and most other readers do.
    Raises ModelError if transformers would refuse it.
    """
    if config.qkv_bias:
        raise ModelError("A model with model.qkv_bias is a Qwen2, to which transformers gives Qwen2's own tokenizer.")
    if config.dim % config.n_heads:
        raise ModelError(f"For a Llama export, dim ({config.dim}) must be a multiple of n_heads ({config.n_heads}).")
    scaling = _hf_rope_scaling(config.rope_scaling)
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base, **(scaling or {})},
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    """The model that config.json describes, with the loss weights at their defaults.

    Raises ModelError for anything that this model cannot compute.
    """
    model_type = hf.get("model_type", "llama")
    if model_type not in ("llama", "mistral", "qwen2"):
        raise ModelError(f"config.json: model_type is {model_type!r}; this model reads llama, mistral and qwen2.")
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    if hf.get("use_sliding_window", True):
        fixed["sliding_window"] = None
    for key, ours in fixed.items():
        if hf.get(key, ours) != ours:
            raise ModelError(f"config.json: {key} is {hf[key]!r}; this model only has {ours!r}.")
    n_heads = hf["num_attention_heads"]
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0), **(hf.get("rope_scaling") or {})}
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // n_heads,
        hidden_dim=hf["intermediate_size"],
        qkv_bias=model_type == "qwen2",
        rope_base=rope["rope_theta"],
        rope_scaling=_rope_scaling(rope),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
        init_std=hf.get("initializer_range", 0.02),
    )


def _hf_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    plain = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return plain
    return plain | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return None
        case "linear":
            return RopeScaling(kind="linear", factor=rope["factor"])
        case "llama3":
            return RopeScaling(
                kind="llama3",
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_seq_len=rope["original_max_position_embeddings"],
            )
        case other:
            raise ModelError(f"config.json: rope_type is {other!r}; this model has default, linear and llama3.")
