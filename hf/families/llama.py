"""Families that are a Llama but for one thing or another."""

from dataclasses import replace
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from triplane.hf.family import Family, sizes
from triplane.hf.layer_kinds import NoRopeLayers, SwitchedWindows, Windows, all_layers, first_of, upper_layers
from triplane.hf.rope import AlphaRope, Rope
from triplane.hf.tensors import Names
from triplane.hf.traits import Heads, Hf, Key, activation, key, number, switch

ENDS = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
ATTENTION = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
}
QK_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
GATED = {
    "mlp.gate_proj": "feed_forward.w_gate",
    "mlp.up_proj": "feed_forward.w_up",
    "mlp.down_proj": "feed_forward.w_down",
}
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
NAMES = Names(ENDS, {**PRE_NORMS, **ATTENTION, **QK_NORMS, **GATED})

FIXED = {"norm.kind": "rms", "feed_forward.kind": "gated"}
QK_NORM = {"attention.qk_norm": {"kind": "rms"}, "attention.qk_norm_over": "head"}
INNER = key("intermediate_size", "feed_forward.hidden_dim")
SILU = activation("hidden_act", "silu")
ATTENTION_BIAS = switch("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False)
MLP_BIAS = switch("mlp_bias", "feed_forward.bias", default=False)


def window(default: int | None) -> Key:
    """Returns the trait of a window that all layers have."""
    return key("sliding_window", "attention.window", type=PositiveInt | None, default=default)


def eps(default: float, *more: str, name: str = "rms_norm_eps") -> Key:
    """Returns the trait of the epsilon of norms, those at the paths `more` too."""
    return number(name, "norm.eps", *more, default=default)


QK_EPS = "attention.qk_norm.eps"

_LLAMA = (Heads(width="head_dim", divides=True), INNER, SILU, Rope(), ATTENTION_BIAS, MLP_BIAS)
LLAMA = Family("llama", "LlamaForCausalLM", NAMES, (*sizes(longest=2048), *_LLAMA, eps(1e-6)), FIXED, zero_biases=True)


MULTIPLIERS = (
    number("embedding_multiplier", "embedding_scale", default=1.0),
    number("residual_multiplier", "residual_scale", default=1.0),
    key("attention_multiplier", "attention.scale", type=PositiveFloat, default=1.0),
    key(
        "logits_scaling",
        "head_scale",
        type=PositiveFloat,
        default=1.0,
        decode=lambda divisor: 1 / divisor,
        encode=lambda scale: 1 / scale,
    ),
)
"""Traits of the Granite families."""


def no_clip(hf: Hf) -> str | None:
    """Says that queries, keys and values are clipped, if they are."""
    return None if hf["clip_qkv"] is None else f"clip_qkv is {hf['clip_qkv']}; this family does not clip"


def _one_width(hf: Hf) -> str | None:
    """Helium's output projection is square."""
    heads, width, dim = hf["num_attention_heads"], hf["head_dim"], hf["hidden_size"]
    if width and heads * width != dim:
        return f"num_attention_heads ({heads}) x head_dim ({width}) is {heads * width}, not hidden_size ({dim})"
    return None


def _like_llama(model_type: str, architecture: str, *traits: Any, **options: Any) -> Family:
    """Returns a family with Llama's names, gated feed-forward and RMSNorm."""
    fixed = FIXED | options.pop("fixed", {})
    return Family(model_type, architecture, NAMES, (INNER, SILU, *traits), fixed, **options)


def _wide(kv_heads: int | None, width: int | None = None) -> Heads:
    return Heads(width="head_dim", kv_default=kv_heads, width_default=width)


MISTRAL = _like_llama(
    "mistral", "MistralForCausalLM", *sizes(longest=131_072), _wide(8), eps(1e-6), Rope(), window(4096)
)
MINISTRAL = _like_llama(
    "ministral", "MinistralForCausalLM", *sizes(longest=131_072), _wide(8), eps(1e-6), Rope(), Windows(all_layers)
)
QWEN2 = _like_llama(
    "qwen2",
    "Qwen2ForCausalLM",
    *(*sizes(longest=32_768), _wide(32), eps(1e-6), Rope(), SwitchedWindows(upper_layers)),
    fixed={"attention.qkv_bias": True},
    tokenizer="Qwen2Tokenizer",
)
QWEN3 = _like_llama(
    "qwen3",
    "Qwen3ForCausalLM",
    *(*sizes(longest=32_768), _wide(32, 128), eps(1e-6, QK_EPS), Rope(), ATTENTION_BIAS, SwitchedWindows(upper_layers)),
    fixed=QK_NORM,
)
SEED_OSS = _like_llama(
    "seed_oss",
    "SeedOssForCausalLM",
    *(*sizes(longest=524_288), _wide(8, 128), eps(1e-6), Rope(), MLP_BIAS),
    switch("attention_bias", "attention.qkv_bias", default=True),
    switch("attention_out_bias", "attention.output_bias", default=False),
)
SMOLLM3 = _like_llama(
    "smollm3",
    "SmolLM3ForCausalLM",
    *(
        *sizes(longest=32_768, tied=True),
        _wide(4),
        eps(1e-6),
        Rope(theta=2e6),
        ATTENTION_BIAS,
        MLP_BIAS,
        NoRopeLayers(),
    ),
)
CWM = _like_llama(
    "cwm",
    "CwmForCausalLM",
    *(*sizes(longest=131_072), Heads(width="head_dim", kv_default=8, width_default=128, divides=True), eps(1e-5)),
    Rope(theta=1e6, absent={"kind": "llama3", "factor": 16.0, "original_seq_len": 8192}),
    *(MLP_BIAS, Windows(first_of(4), window=8192)),
)
GRANITE = _like_llama(
    "granite",
    "GraniteForCausalLM",
    *(*sizes(longest=2048), _wide(None), eps(1e-6), Rope(), ATTENTION_BIAS, MLP_BIAS),
    *MULTIPLIERS,
)
HELIUM = _like_llama(
    "helium",
    "HeliumForCausalLM",
    *(*sizes(longest=4096), _wide(20, 128), eps(1e-8), Rope(theta=100_000.0, interleaved=True), MLP_BIAS),
    switch("attention_bias", "attention.qkv_bias", default=False),
    problem=_one_width,
)
ERNIE4_5 = _like_llama(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    *(*sizes(longest=131_072, tied=True), _wide(2, 128), eps(1e-5), Rope(theta=500_000.0, interleaved=True)),
    switch("use_bias", "attention.qkv_bias", "attention.output_bias", "feed_forward.bias", default=False),
)
_HUNYUAN = {"self_attn.query_layernorm": "attention.q_norm", "self_attn.key_layernorm": "attention.k_norm"}
HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    Names(ENDS, {**PRE_NORMS, **ATTENTION, **_HUNYUAN, **GATED}),
    (*sizes(longest=2048), INNER, SILU, _wide(None), eps(1e-5, QK_EPS), AlphaRope(), ATTENTION_BIAS),
    {**FIXED, **QK_NORM, "attention.qk_norm_after_rotation": True},
)
_NAMES_OF_PLAIN = {"mlp.up_proj": "feed_forward.w_up", "mlp.down_proj": "feed_forward.w_down"}
ARCEE = Family(
    "arcee",
    "ArceeForCausalLM",
    Names(ENDS, {**PRE_NORMS, **ATTENTION, **_NAMES_OF_PLAIN}),
    (
        *(*sizes(longest=4096), Heads(width="head_dim", divides=True), eps(1e-5), Rope(), ATTENTION_BIAS, MLP_BIAS),
        *(INNER, activation("hidden_act", "relu2")),
    ),
    {"norm.kind": "rms", "feed_forward.kind": "plain"},
)

INTERNLM3 = Family(
    "internlm3",
    "LlamaForCausalLM",
    NAMES,
    (
        *(*sizes(longest=32_768), Heads(width="head_dim", kv_default=2, width_default=128, divides=True)),
        *(INNER, SILU, Rope(), eps(1e-5)),
        replace(ATTENTION_BIAS, also=("qkv_bias",)),
        replace(MLP_BIAS, also=("bias",)),
    ),
    FIXED,
    written=False,
)
IQUESTCODER = Family(
    "iquestcoder",
    "LlamaForCausalLM",
    NAMES,
    (
        *(*sizes(longest=131_072), Heads(width="head_dim", kv_default=8, width_default=128, divides=True)),
        *(INNER, SILU, Rope(), ATTENTION_BIAS, MLP_BIAS, eps(1e-5)),
        key("clip_qkv", type=float | None, default=None),
    ),
    FIXED,
    written=False,
    problem=no_clip,
)
