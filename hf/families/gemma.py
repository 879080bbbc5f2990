"""Gemma: norms that add 1 to their weight, GELU in the gate, scaled embeddings."""

from pydantic import PositiveFloat

from triplane.hf.families.llama import ATTENTION, ATTENTION_BIAS, ENDS, GATED, INNER, NAMES, QK_EPS, QK_NORMS, eps
from triplane.hf.family import Family, sizes
from triplane.hf.layer_kinds import RopeByKind, Windows, every
from triplane.hf.rope import Rope
from triplane.hf.tensors import Names
from triplane.hf.traits import ACTIVATIONS, Heads, Key, Trait, Values, activation, key, must_be

_FIXED = {"norm.kind": "rms", "norm.unit_offset": True, "feed_forward.kind": "gated"}
_CAUSAL = must_be("use_bidirectional_attention", False)
_SANDWICH = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}
_SANDWICH_NAMES = Names(ENDS, {**_SANDWICH, **ATTENTION, **QK_NORMS, **GATED})
_SCALE = key(
    "query_pre_attn_scalar",
    "attention.scale",
    type=PositiveFloat,
    default=256,
    decode=lambda scalar: scalar**-0.5,
    encode=lambda scale: None if scale is None else _whole(scale**-2),
)


def _whole(number: float) -> float:
    """Returns the integer that a number is but for rounding: transformers demands one."""
    return round(number) if abs(number - round(number)) < 1e-6 * number else number


def _cap(name: str, path: str, default: float | None) -> Key:
    return key(name, path, type=PositiveFloat | None, default=default)


def _scaled(model: Values) -> Values:
    return {"embedding_scale": model["dim"] ** 0.5}


def _heads(kv_heads: int, *, divides: bool) -> Heads:
    return Heads(width="head_dim", kv_default=kv_heads, width_default=256, divides=divides)


_TANH = {"gelu": "gelu_tanh"}
"""Gemma's first releases say GELU and mean its approximation."""
_GEMMA_ACTIVATION = Key(
    "hidden_act",
    activation("hidden_act", "silu").type,
    ("feed_forward.activation",),
    default="gelu_pytorch_tanh",
    decode=lambda name: (ACTIVATIONS | _TANH)[name],
    encode=activation("hidden_act", "silu").encode,
    also=(),
)

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    NAMES,
    (
        *(*sizes(longest=8192, tied=True), _heads(16, divides=False), INNER, _GEMMA_ACTIVATION, eps(1e-6), Rope()),
        *(ATTENTION_BIAS, _CAUSAL),
    ),
    _FIXED,
    _scaled,
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _SANDWICH_NAMES,
    (
        *(*sizes(longest=8192, tied=True), _heads(4, divides=True), INNER, Rope(), ATTENTION_BIAS, _CAUSAL),
        *(activation("hidden_activation", "gelu_pytorch_tanh"), eps(1e-6), _SCALE, Windows(every(2))),
        _cap("final_logit_softcapping", "head_softcap", 30.0),
        _cap("attn_logit_softcapping", "attention.softcap", 50.0),
    ),
    {**_FIXED, "norm_placement": "sandwich"},
    _scaled,
)
_GEMMA3: tuple[Trait, ...] = (
    *(*sizes(longest=131_072, tied=True), _heads(4, divides=True), INNER, ATTENTION_BIAS, _CAUSAL),
    *(activation("hidden_activation", "gelu_pytorch_tanh"), eps(1e-6, QK_EPS), _SCALE),
    Windows(every(6, "sliding_window_pattern"), period="sliding_window_pattern"),
    RopeByKind(theta=1e6, local_theta=1e4, local_key="rope_local_base_freq"),
    _cap("final_logit_softcapping", "head_softcap", None),
)
_GEMMA3_FIXED = {
    **_FIXED,
    "norm_placement": "sandwich",
    "attention.qk_norm": {"kind": "rms", "unit_offset": True},
    "attention.qk_norm_over": "head",
}
GEMMA3_TEXT = Family("gemma3_text", "Gemma3ForCausalLM", _SANDWICH_NAMES, _GEMMA3, _GEMMA3_FIXED, _scaled)
GEMMA3 = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    Names(
        {"model.language_model.embed_tokens": "embedding", "model.language_model.norm": "norm", "lm_head": "head"},
        _SANDWICH_NAMES.layer,
        layers="model.language_model.layers",
        others=("model.vision_tower.", "model.multi_modal_projector."),
        renamed=(
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ),
    ),
    _GEMMA3,
    _GEMMA3_FIXED,
    _scaled,
    written=False,
    nested="text_config",
)
