"""Names and config in Hugging Face's terms, there and back, and as transformers reads them."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_models import small_config
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from triplane.model.config import RopeScaling
from triplane.model.errors import ModelError
from triplane.model.hf import from_hf_config, from_hf_name, hf_config, to_hf_name
from triplane.model.transformer import Transformer

LINEAR = RopeScaling(kind="linear", factor=3)
LLAMA3 = RopeScaling(kind="llama3", factor=4, low_freq_factor=1, high_freq_factor=4, original_seq_len=32)
SCALINGS = pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["plain", "linear", "llama3"])


def test_names_are_llamas_and_come_back():
    with torch.device("meta"):
        ours = [name for name, _ in Transformer(small_config()).named_parameters()]
        theirs = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2)).state_dict().keys()
    assert {to_hf_name(name) for name in ours} == set(theirs)
    assert [from_hf_name(to_hf_name(name)) for name in ours] == ours


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.0.self_attn.o_proj.bias", "h.0.attn.weight"])
def test_weights_without_a_place_are_refused(name):
    with pytest.raises(ModelError, match=name):
        from_hf_name(name)


@SCALINGS
@pytest.mark.parametrize("tie", [False, True])
def test_config_comes_back(scaling, tie):
    config = small_config(
        rope_scaling=scaling, rope_base=5e5, tie_embeddings=tie, norm_eps=1e-6, init_std=0.01, head_dim=16
    )
    written = json.loads(json.dumps(hf_config(config, 128, 1, 2, torch.bfloat16)))
    assert from_hf_config(written) == config
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    assert from_hf_config(older) == config
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert from_hf_config(newer) == config


@SCALINGS
@pytest.mark.parametrize("dropped", [(), ("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")])
def test_transformers_reads_each_form_alike(scaling, dropped, tmp_path):
    config = small_config(rope_scaling=scaling, rope_base=5e5)
    written = hf_config(config, 128, 1, None, torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k not in dropped}))
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, LlamaConfig)
    assert (read.bos_token_id, read.eos_token_id) == (1, None)
    assert (read.dtype, read.max_position_embeddings) == (torch.bfloat16, 128)
    assert read.rope_parameters == written["rope_parameters"]
    assert from_hf_config(read.to_dict()) == config


def test_a_llama_config_with_defaults_left_out():
    hf = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 80}
    config = from_hf_config(hf | {"vocab_size": 96, "rms_norm_eps": 1e-5})
    assert config == small_config(n_kv_heads=6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma"),
        ("sliding_window", 4096),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_what_the_model_cannot_compute_is_refused(key, value):
    written = hf_config(small_config(), 128, 1, 2, torch.float32)
    with pytest.raises(ModelError, match="this model"):
        from_hf_config(written | {key: value})


def test_a_width_that_transformers_refuses_is_refused():
    with pytest.raises(ModelError, match=r"dim \(50\) must be a multiple of n_heads \(6\)"):
        hf_config(small_config(dim=50), 128, 1, 2, torch.float32)
    with pytest.raises(StrictDataclassError, match="multiple of the number of attention heads"):
        LlamaConfig(hidden_size=50, num_attention_heads=6, head_dim=8)
