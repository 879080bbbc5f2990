"""Cohere's Command R: LayerNorm without bias, parallel branches after one norm, scaled logits."""

from triplane.hf.families.llama import ATTENTION, ATTENTION_BIAS, ENDS, GATED, INNER, QK_EPS, QK_NORMS, SILU, eps
from triplane.hf.family import Family, sizes
from triplane.hf.layer_kinds import Windows, every
from triplane.hf.rope import Rope
from triplane.hf.tensors import Names
from triplane.hf.traits import Heads, Optional, number

_COHERE_NAMES = Names(ENDS, {"input_layernorm": "attention_norm", **ATTENTION, **QK_NORMS, **GATED})
_COHERE = {"norm.kind": "layer", "residual": "parallel_shared_norm", "norm.bias": False, "feed_forward.kind": "gated"}
_LOGIT_SCALE = number("logit_scale", "head_scale", default=0.0625)
COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    _COHERE_NAMES,
    (
        *(*sizes(longest=8192, tied=True), Heads(width="head_dim"), INNER, SILU, ATTENTION_BIAS, _LOGIT_SCALE),
        Rope(theta=500_000.0, interleaved=True),
        Optional("use_qk_norm", "attention.qk_norm", lambda: {"kind": "layer", "bias": False}),
        eps(1e-5, QK_EPS, name="layer_norm_eps"),
    ),
    {**_COHERE, "attention.qk_norm_over": "each"},
)
COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    _COHERE_NAMES,
    (
        *(*sizes(longest=8192, tied=True), Heads(), INNER, SILU, ATTENTION_BIAS, _LOGIT_SCALE),
        *(eps(1e-5, name="layer_norm_eps"), Rope(interleaved=True)),
        Windows(every(4, "sliding_window_pattern"), period="sliding_window_pattern", full_turns="never"),
    ),
    _COHERE,
)
