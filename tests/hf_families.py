"""Small models of every Hugging Face family, by transformers' own classes, in variants that use all it can vary."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SQUARE = {key: value for key, value in SMALL.items() if key != "head_dim"}
EQUAL = {key: value for key, value in SQUARE.items() if key != "num_key_value_heads"}
GPT = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 512}
WINDOW = {"sliding_window": 48}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LOCAL = {"rope_type": "default", "rope_theta": 5e3}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
DEEPSEEK = EQUAL | {
    "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "num_key_value_heads": 6,
}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 12.0, "logits_scaling": 3.0, "residual_multiplier": 0.22}
MULTIPLIERS |= {"attention_multiplier": 0.0625}
QWEN2_MOE = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48,
}  # fmt: skip

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        SMALL,
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        SQUARE | {"hidden_act": "gelu", "rope_parameters": YARN, "num_key_value_heads": 1},
    ],
    "mistral": [SMALL | WINDOW, SMALL | {"sliding_window": None, "rope_parameters": LINEAR}],
    "ministral": [SMALL | WINDOW, SMALL | WINDOW | {"layer_types": MIXED}],
    "qwen2": [SMALL, SMALL | WINDOW | {"use_sliding_window": True, "max_window_layers": 2, "rope_parameters": YARN}],
    "qwen3": [SMALL, SMALL | WINDOW | {"use_sliding_window": True, "layer_types": MIXED, "attention_bias": True}],
    "seed_oss": [SMALL, SMALL | {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}],
    "smollm3": [
        SMALL,
        SMALL | WINDOW | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1], "attention_bias": True},
    ],
    "granite": [SMALL | MULTIPLIERS | {"mlp_bias": True}],
    "helium": [SMALL | {"head_dim": 8, "attention_bias": True}],
    "ernie4_5": [SMALL, SMALL | {"use_bias": True, "tie_word_embeddings": False}],
    "hunyuan_v1_dense": [
        SMALL,
        SMALL | {"attention_bias": True, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    ],
    "arcee": [SMALL, SMALL | {"mlp_bias": True, "attention_bias": True}],
    "cwm": [SMALL | WINDOW],
    "olmo": [SQUARE, SQUARE | {"clip_qkv": 0.8, "attention_bias": True}],
    "olmo2": [SQUARE, SQUARE | {"attention_bias": True, "tie_word_embeddings": True}],
    "olmo3": [
        SQUARE | WINDOW,
        SQUARE
        | WINDOW
        | {"rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL}},
    ],
    "exaone4": [SMALL | WINDOW, SMALL | {"sliding_window": None, "layer_types": ["full_attention"] * 4}],
    "glm4": [SMALL, SMALL | {"attention_bias": False, "partial_rotary_factor": 0.25}],
    "gemma": [SMALL, SMALL | {"attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": False}],
    "gemma2": [
        SMALL | WINDOW | {"query_pre_attn_scalar": 24},
        SMALL | WINDOW | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": None, "layer_types": MIXED},
    ],
    "gemma3_text": [
        SMALL | WINDOW | {"query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
        SMALL
        | WINDOW
        | {"layer_types": MIXED, "final_logit_softcapping": 3.0}
        | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
    ],
    "cohere": [SMALL, SMALL | {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}],
    "cohere2": [SQUARE | WINDOW, SQUARE | WINDOW | {"layer_types": MIXED, "attention_bias": True}],
    "gpt2": [GPT, GPT | {"n_inner": 80, "activation_function": "relu", "scale_attn_weights": False}],
    "gpt_bigcode": [GPT, GPT | {"multi_query": False, "tie_word_embeddings": False}],
    "opt": [
        EQUAL | {"ffn_dim": 64},
        EQUAL | {"ffn_dim": 64, "do_layer_norm_before": False, "enable_bias": False},
        EQUAL | {"ffn_dim": 64, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ],
    "bloom": [
        {"vocab_size": 96, "hidden_size": 48, "n_layer": 3, "n_head": 6, "seq_length": 512},
        {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 8, "tie_word_embeddings": False},
    ],
    "mpt": [
        {"vocab_size": 96, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 512},
        {
            "vocab_size": 96, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 512,
            "attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.5},
        },
    ],
    "gpt_neox": [
        EQUAL,
        EQUAL | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast"}
        | {"rotary_pct": 0.5, "rotary_emb_base": 5e3, "tie_word_embeddings": True},
    ],
    "gptj": [GPT | {"rotary_dim": 4}, GPT | {"rotary_dim": 8, "n_inner": 80}],
    "phi": [SQUARE, SQUARE | {"qk_layernorm": True, "partial_rotary_factor": 0.25}],
    "phi3": [SMALL | WINDOW, SQUARE | {"partial_rotary_factor": 0.5}],
    "starcoder2": [SMALL, SMALL | WINDOW | {"use_bias": False, "tie_word_embeddings": False}],
    "stablelm": [SQUARE, SQUARE | {"use_qkv_bias": True, "use_parallel_residual": True}],
    "nemotron": [SMALL, SMALL | {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.25}],
    "falcon": [
        EQUAL,
        EQUAL | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        EQUAL | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        EQUAL | {"multi_query": False, "parallel_attn": False, "ffn_hidden_size": 80, "bias": True},
    ],
    "mixtral": [SMALL, SMALL | WINDOW | {"num_local_experts": 5, "num_experts_per_tok": 3, "hidden_act": "gelu"}],
    "qwen3_moe": [
        SMALL | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        SMALL | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 1, "attention_bias": True}
        | {"norm_topk_prob": True, "mlp_only_layers": [1, 2]},
        SMALL | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "mlp_only_layers": [3]}
        | {"decoder_sparse_step": 2, "num_hidden_layers": 5},
    ],
    "qwen2_moe": [
        SMALL | QWEN2_MOE,
        SMALL | QWEN2_MOE | {"mlp_only_layers": [0], "qkv_bias": False, "norm_topk_prob": True},
    ],
    "olmoe": [
        SQUARE | {"num_experts": 5, "num_experts_per_tok": 2},
        SQUARE | {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ],
    "granitemoe": [
        SMALL | MULTIPLIERS | {"num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True},
        SMALL | {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ],
    "granitemoeshared": [
        SMALL | MULTIPLIERS | {"num_local_experts": 5, "shared_intermediate_size": 128},
        SMALL | {"num_local_experts": 5},
    ],
    "gpt_oss": [
        SMALL | WINDOW | {"num_local_experts": 5, "num_experts_per_tok": 3},
        SMALL | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 1, "attention_bias": False}
        | {"layer_types": MIXED, "swiglu_limit": 0.8, "rope_parameters": YARN, "tie_word_embeddings": True},
    ],
    "deepseek_v3": [
        DEEPSEEK | {"first_k_dense_replace": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
        DEEPSEEK | {"q_lora_rank": None, "rope_interleave": False, "first_k_dense_replace": 0, "v_head_dim": 20}
        | {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        DEEPSEEK | {"first_k_dense_replace": 4, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    ],
    "deepseek_v2": [
        DEEPSEEK | {"topk_method": "greedy", "q_lora_rank": None, "first_k_dense_replace": 1},
        DEEPSEEK | {"routed_scaling_factor": 2.0, "n_shared_experts": 2, "n_group": 1, "topk_group": 1},
        DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "first_k_dense_replace": 1},
    ],
}  # fmt: skip
"""Keys of config.json, by model type."""
CASES = {f"{family} {n}": (family, keys) for family, variants in VARIANTS.items() for n, keys in enumerate(variants)}


def their_model(family: str, keys: dict[str, Any], seed: int = 0) -> Any:
    """Returns transformers' model, fp32, with weights that make every part matter."""
    config = AutoConfig.for_model(family, **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2} | keys)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise / max(parameter.shape[-1], 48) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.2 * torch.randn(buffer.shape)
    return model


def their_logits(model: Any, tokens_S: Tensor) -> Tensor:
    """Returns transformers' logits of one sequence, (S, V)."""
    logits: Tensor = model(tokens_S[None]).logits[0]
    return logits
