"""Names and config in Hugging Face's terms, there and back, and as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_models import small_config
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from triplane.hf.config import describe, family_of, hf_config
from triplane.hf.families.table import FAMILIES
from triplane.model.parts.rotary import LinearScaling, Llama3Scaling, Scaling
from triplane.storage.errors import ModelError

LINEAR = LinearScaling(kind="linear", factor=3)
LLAMA3 = Llama3Scaling(kind="llama3", factor=4, low_freq_factor=1, high_freq_factor=4, original_seq_len=32)
SCALINGS = pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["plain", "linear", "llama3"])


def test_names_are_llamas() -> None:
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2)).state_dict().keys()
    assert family_of(small_config()).tensors(small_config()).keys() == set(theirs)


@SCALINGS
@pytest.mark.parametrize("tie", [False, True])
def test_config_comes_back(scaling: Scaling | None, tie: bool) -> None:
    config = small_config(
        rope_scaling=scaling, rope_base=5e5, tie_embeddings=tie, norm_eps=1e-6, init_std=0.01, head_dim=16
    )
    written = json.loads(json.dumps(hf_config(config, 128, family_of(config), bos_id=1, eos_id=2, dtype="bfloat16")))
    assert describe(written).model == config
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    assert describe(older).model == config
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert describe(newer).model == config


@SCALINGS
@pytest.mark.parametrize("dropped", [(), ("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")])
def test_transformers_reads_each_form_alike(scaling: Scaling | None, dropped: str, tmp_path: Path) -> None:
    config = small_config(rope_scaling=scaling, rope_base=5e5)
    written = hf_config(config, 128, family_of(config), bos_id=1, eos_id=None, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k not in dropped}))
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, LlamaConfig)
    assert (read.bos_token_id, read.eos_token_id) == (1, None)
    assert (read.dtype, read.max_position_embeddings) == (torch.bfloat16, 128)
    assert read.rope_parameters == written["rope_parameters"]
    assert describe(read.to_dict()).model == config


SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 80, "vocab_size": 96}


REFUSED: dict[str, tuple[Any, str]] = {
    "no table": ([], "holds no table"),
    "nothing": (None, "holds no table"),
    "no type": ({"model_type": ...}, "no model_type; this model reads .*llama"),
    "other layers": (
        {"model_type": "qwen3_next"},
        "'qwen3_next', which has layers other than attention; this model reads .*llama",
    ),
    "a shared expert of another width": (
        {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 2000},
        r"shared_expert_intermediate_size \(2000\) is not a multiple of the width of an expert \(1408\)",
    ),
    "quantized": (
        {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
        r"quantized \(mxfp4\), .*Mxfp4Config\(dequantize=True\), and save it by save_pretrained$",
    ),
    "otherwise quantized": ({"quantization_config": {"quant_method": "awq"}}, r"\(awq\), .* have 16 bits or more$"),
    "another slope of the gate": ({"model_type": "gpt_oss", "swiglu_alpha": 1.5}, "swiglu_alpha is 1.5"),
    "unheard of": ({"model_type": "kraken"}, "model_type is 'kraken'; this"),
    "type a list": ({"model_type": []}, r"model_type is '\[\]'"),
    "vision": ({"model_type": "pixels", "text_config": {}}, "'pixels', which has a vision"),
    "no width": ({"hidden_size": ...}, "no hidden_size"),
    "a window that is not there": (
        {"model_type": "ministral", "sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]},
        "layers have sliding windows, but sliding_window is null",
    ),
    "too few layers listed": ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "lists 1 layers, .* is 2"),
    "layers of another kind": (
        {"model_type": "olmo3", "layer_types": ["linear_attention", "full_attention"]},
        "layer_types.0 is 'linear_attention'",
    ),
    "both ways": ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "another scale in each layer": (
        {"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 2, "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True",
    ),
    "ALiBi that is scaled": ({"model_type": "falcon", "alibi": True}, "alibi is True"),
    "no such block": (
        {"model_type": "falcon", "num_ln_in_parallel_attn": 2},
        "num_ln_in_parallel_attn 2: transformers",
    ),
    "norms by head": ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm is True"),
    "no ALiBi": (
        {"model_type": "mpt", "d_model": 48, "n_heads": 6, "n_layers": 2, "attn_config": {"alibi": False}},
        "attn_config.alibi is False; transformers computes True",
    ),
    "narrow embeddings": (
        {"model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 24},
        r"word_embed_proj_dim \(24\)",
    ),
    "square output": (
        {"model_type": "helium", "head_dim": 16},
        r"\(6\) x head_dim \(16\) is 96, not hidden_size \(48\)",
    ),
    "more than a head turns": (
        {"model_type": "gptj", "n_embd": 48, "n_head": 6, "n_layer": 2, "rotary_dim": 16},
        r"rotary_dim \(16\) is over the width of a head \(8\)",
    ),
    "activation": ({"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'"),
    "a number for truth": ({"mlp_bias": 2}, "mlp_bias is 2"),
    "text for a number": ({"vocab_size": "96"}, "vocab_size is '96'"),
    "part of a number": ({"hidden_size": 48.5}, "hidden_size is 48.5"),
    "truth for a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "a list for a number": ({"head_dim": [8]}, r"head_dim is \[8\]"),
    "null": ({"max_position_embeddings": None}, "max_position_embeddings is None"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "zero epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "infinite base": ({"rope_parameters": None, "rope_theta": float("inf")}, "rope_theta is inf"),
    "too large for bytes": ({"hidden_size": 2**62}, "hidden_size is 4611686018427387904"),
    "heads that are not shared alike": ({"num_key_value_heads": 4}, r"\(6\) is not a multiple .* \(4\)"),
    "odd heads": ({"head_dim": 7}, r"head_dim \(7\) x fraction \(1\) is 7, not an even"),
    "rope of text": ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic'; this family has",
    ),
    "longrope beside default": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
    "only a part turns": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "no width that divides": (
        {"hidden_size": 50},
        r"hidden_size \(50\) is not a multiple of num_attention_heads \(6\)",
    ),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "of its own for 'full_attention'"),
    "clipped": ({"model_type": "iquestcoder", "clip_qkv": 8.0}, "clip_qkv is 8.0"),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "'linear', but there is no factor"),
    "shrinking": ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_parameters.factor is 0.5"),
    "no low frequency": ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "no low_freq_factor"),
    "no blend": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
        r"low_freq_factor \(4.0\) is not below",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_model_cannot_compute_is_refused(changes: dict[str, Any], expected: str) -> None:
    content = changes
    if isinstance(changes, dict):
        content = hf_config(small_config(), 128, FAMILIES["llama"], bos_id=1, eos_id=2, dtype="float32") | changes
        content = {key: value for key, value in content.items() if value is not ...}
    with pytest.raises(ModelError, match=f"^x/config.json: .*{expected}") as caught:
        describe(content, "x/config.json")
    assert "\n" not in str(caught.value)


ACCEPTED = {
    "factor 1": {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
    "base beside": {"rope_parameters": {"rope_type": "default"}},
    "ties of null": {"tie_word_embeddings": None},
    "a window that Llama does not heed": {"sliding_window": 16},
    "a window as long as the context": {"model_type": "mistral", "sliding_window": 128},
    "a mistral without": {"model_type": "mistral", "sliding_window": None},
    "no epsilon": {"rms_norm_eps": ..., "_": 1},
    "swish": {"hidden_act": "swish"},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_makes_no_difference_is_accepted(changes: dict[str, Any]) -> None:
    config = small_config(norm_eps=1e-6)
    content = hf_config(config, 128, family_of(config), bos_id=1, eos_id=2, dtype="float32") | changes
    assert describe({key: value for key, value in content.items() if value is not ...}).model == config


@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "max_window_layers": 2}], ids=str)
def test_a_qwen2_whose_layers_have_no_window_is_accepted(changes: dict[str, Any]) -> None:
    content = hf_config(small_config(), 128, FAMILIES["llama"], bos_id=1, eos_id=2, dtype="float32") | {
        "model_type": "qwen2",
        "sliding_window": 64,
    }
    assert describe(content | changes).model == small_config(qkv_bias=True)


def test_a_width_that_a_llama_may_not_have_makes_a_mistral() -> None:
    assert family_of(small_config(dim=50)).model_type == "mistral"
    with pytest.raises(StrictDataclassError, match="multiple of the number of attention heads"):
        LlamaConfig(hidden_size=50, num_attention_heads=6, head_dim=8)
