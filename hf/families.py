"""Hugging Face model types: those that are a Llama by structure, and what others have that this model lacks."""

from typing import Any

from triplane.model.config import ModelConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "seed_oss": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524_288,
        "attention_bias": True,
    },
    "internlm3": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
    },
    "iquestcoder": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
    },
}
"""Defaults of transformers for keys missing from config.json, where they differ from the schema's."""

_CLASSIC = "LayerNorm, a plain feed-forward block"
_EXPERTS = "mixture of experts"
_STATES = "layers other than attention"
_BIDIRECTIONAL = "bidirectional attention"
_WRAPPER = "a vision or audio part around the text model"

_LACKING = {
    "arcee": "ReLU² in the feed-forward block",
    "bamba": _STATES,
    "bert": _BIDIRECTIONAL,
    "bloom": f"{_CLASSIC}, ALiBi",
    "cohere": "LayerNorm, parallel blocks, scaled logits",
    "cohere2": "LayerNorm, parallel blocks, sliding windows",
    "cwm": "sliding windows",
    "deepseek_v2": f"latent attention, {_EXPERTS}",
    "deepseek_v3": f"latent attention, {_EXPERTS}",
    "ernie4_5": "interleaved rotary pairs",
    "exaone4": "norms after blocks, QK-norm, sliding windows",
    "falcon": f"{_CLASSIC}, parallel blocks",
    "gemma": "GELU in the feed-forward block, scaled embeddings",
    "gemma2": "norms on both sides of blocks, sliding windows, soft caps",
    "gemma3": _WRAPPER,
    "gemma3_text": "norms on both sides of blocks, QK-norm, sliding windows",
    "glm4": "norms on both sides of blocks, partial rotary embedding",
    "gpt2": f"{_CLASSIC}, learned positions",
    "gpt_bigcode": f"{_CLASSIC}, learned positions",
    "gpt_neox": f"{_CLASSIC}, partial rotary embedding, parallel blocks",
    "gpt_oss": f"{_EXPERTS}, attention sinks, sliding windows",
    "gptj": f"{_CLASSIC}, partial rotary embedding, parallel blocks",
    "granite": "multipliers of embeddings, residuals, attention and logits",
    "helium": "interleaved rotary pairs",
    "hunyuan_v1_dense": "QK-norm",
    "jamba": _STATES,
    "kimi_linear": _STATES,
    "lfm2": _STATES,
    "llama4": _WRAPPER,
    "llava": _WRAPPER,
    "mamba": _STATES,
    "ministral": "sliding windows",
    "mistral3": _WRAPPER,
    "mixtral": _EXPERTS,
    "modernbert": _BIDIRECTIONAL,
    "mpt": f"{_CLASSIC}, ALiBi",
    "nemotron": "LayerNorm, partial rotary embedding, ReLU²",
    "nemotron_h": _STATES,
    "olmo": "LayerNorm",
    "olmo2": "norms after blocks, QK-norm",
    "olmo3": "norms after blocks, QK-norm, sliding windows",
    "olmoe": f"{_EXPERTS}, QK-norm",
    "opt": f"{_CLASSIC}, learned positions",
    "phi": f"{_CLASSIC}, partial rotary embedding, parallel blocks",
    "phi3": "fused projections",
    "qwen2_moe": _EXPERTS,
    "qwen3": "QK-norm",
    "qwen3_5": _WRAPPER,
    "qwen3_moe": f"{_EXPERTS}, QK-norm",
    "qwen3_next": _STATES,
    "roberta": _BIDIRECTIONAL,
    "smollm3": "layers without rotary embedding",
    "stablelm": "LayerNorm, partial rotary embedding",
    "starcoder2": f"{_CLASSIC}, biases, sliding windows",
    "t5": "an encoder",
}


def family_problem(hf: dict[str, Any]) -> str | None:
    """Why config.json describes none of `FAMILIES`; None if it does."""
    readable = f"this model reads {', '.join(FAMILIES)}"
    if "model_type" not in hf:
        return f"no model_type; {readable}"
    model_type = hf["model_type"]
    if isinstance(model_type, str) and model_type in FAMILIES:
        return None
    lacking = _LACKING.get(model_type) if isinstance(model_type, str) else None
    if lacking is None and "text_config" in hf:
        lacking = _WRAPPER
    if lacking is None and hf.get("is_encoder_decoder"):
        lacking = "an encoder"
    has = f", which has {lacking}" if lacking else ""
    return f"model_type is {str(model_type)[:60]!r}{has}; {readable}"


def llama_problem(config: ModelConfig) -> str | None:
    """Why transformers would refuse the model as a Llama."""
    if config.dim % config.attention.n_heads:
        return f"for a Llama, model.dim ({config.dim}) must be a multiple of model.n_heads ({config.attention.n_heads})"
    return None
