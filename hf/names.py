"""Our weights' names in Hugging Face's terms and the config.json of an export; `config.py` reads one.

A model is a `LlamaForCausalLM`: same pairs in RoPE, same weights, nothing permuted. So are the other families that can
be read. A model with `qkv_bias` is a Llama with `attention_bias` whose output bias, which ours lacks, is zero.
"""

from typing import Any

import torch

from triplane.hf.families import llama_problem
from triplane.model.config import ModelConfig
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.rotary import Llama3Scaling, Rotary, Scaling
from triplane.storage.errors import ModelError

OUTPUT_BIAS = "attention.wo.bias"
"""A block's output bias. A Llama with `attention_bias` has it; our model does not."""

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
    OUTPUT_BIAS: "self_attn.o_proj.bias",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w_gate.weight": "mlp.gate_proj.weight",
    "feed_forward.w_up.weight": "mlp.up_proj.weight",
    "feed_forward.w_down.weight": "mlp.down_proj.weight",
}


def to_hf_name(name: str) -> str:
    """`blocks.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if not name.startswith("blocks."):
        return _TO_HF[name]
    _, number, rest = name.split(".", 2)
    return f"model.layers.{number}.{_TO_HF[rest]}"


def hf_config(
    config: ModelConfig, context: int, *, bos_id: int | None, eos_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The content of config.json of a model that reads `context` tokens.

    RoPE and dtype stand there twice: as transformers 5 names them, and as 4 and most other readers do.
    Raises ModelError if transformers would refuse it.
    """
    if problem := llama_problem(config):
        raise ModelError(problem)
    attention, rotary = config.attention, config.positions
    assert isinstance(rotary, Rotary) and isinstance(config.norm, RmsNorm)
    scaling = _hf_rope_scaling(rotary.scaling)
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": attention.qkv_bias,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.feed_forward.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": rotary.base, **(scaling or {})},
        "rope_theta": rotary.base,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def _hf_rope_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    plain = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return plain
    assert isinstance(scaling, Llama3Scaling)
    return plain | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
