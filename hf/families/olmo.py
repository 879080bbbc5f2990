"""OLMo and others whose norms stand elsewhere than a Llama's."""

from pydantic import PositiveFloat

from triplane.hf.families.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    FIXED,
    GATED,
    INNER,
    NAMES,
    QK_EPS,
    QK_NORM,
    QK_NORMS,
    SILU,
    eps,
)
from triplane.hf.family import Family, sizes
from triplane.hf.layer_kinds import RopeByKind, Windows, every
from triplane.hf.rope import Rope
from triplane.hf.tensors import Holds, Names
from triplane.hf.traits import Heads, key, switch

_AFTER = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}
_AFTER_NAMES = Names(ENDS, {**ATTENTION, **QK_NORMS, **_AFTER, **GATED})
_OUTPUT = {**FIXED, **QK_NORM, "norm_placement": "output"}
_HEADS = Heads(width="head_dim")

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    NAMES,
    (
        *(*sizes(longest=2048), _HEADS, INNER, SILU, Rope(), ATTENTION_BIAS),
        key("clip_qkv", "attention.clip_qkv", type=PositiveFloat | None, default=None),
    ),
    {
        "norm.kind": "layer",
        "norm.gain": False,
        "norm.bias": False,
        "norm.eps": 1e-5,
        "feed_forward.kind": "gated",
    },
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _AFTER_NAMES,
    (*sizes(longest=2048), _HEADS, INNER, SILU, eps(1e-5, QK_EPS), Rope(), ATTENTION_BIAS),
    {**_OUTPUT, "attention.qk_norm_over": "all"},
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _AFTER_NAMES,
    (
        *(*sizes(longest=2048), _HEADS, INNER, SILU, eps(1e-5, QK_EPS), ATTENTION_BIAS),
        *(Windows(every(4)), RopeByKind(theta=500_000.0, local_theta=500_000.0)),
    ),
    {**_OUTPUT, "attention.qk_norm_over": "all"},
)
EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    _AFTER_NAMES,
    (
        *(*sizes(longest=2048), Heads(width="head_dim", kv_default=32), INNER, SILU, eps(1e-5, QK_EPS), Rope()),
        Windows(every(4, "sliding_window_pattern"), period="sliding_window_pattern", full_turns="without_windows"),
    ),
    _OUTPUT,
)
_GLM4: dict[str, str | Holds] = {
    "input_layernorm": "attention_norm",
    "post_self_attn_layernorm": "attention_post_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "post_mlp_layernorm": "feed_forward_post_norm",
    "mlp.gate_up_proj": Holds(("feed_forward.w_gate", "feed_forward.w_up")),
    "mlp.down_proj": "feed_forward.w_down",
}
GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    Names(ENDS, _GLM4 | ATTENTION),
    (
        *(*sizes(longest=131_072), Heads(width="head_dim", kv_default=2, width_default=128), INNER, SILU),
        *(eps(1.5625e-7), Rope(fraction=0.5, interleaved=True)),
        switch("attention_bias", "attention.qkv_bias", default=True),
    ),
    {**FIXED, "norm_placement": "sandwich"},
)
