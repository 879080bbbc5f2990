"""Families with sparse experts in every layer."""

from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from triplane.hf.families.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    PRE_NORMS,
    QK_EPS,
    QK_NORM,
    QK_NORMS,
    SILU,
    eps,
    no_clip,
    window,
)
from triplane.hf.family import Family, sizes
from triplane.hf.rope import Rope
from triplane.hf.tensors import Modules, Names
from triplane.hf.traits import Heads, Hf, Required, Trait, key, switch

FIXED = {"norm.kind": "rms", "feed_forward.kind": "experts", "feed_forward.router": "softmax"}


def _names(router: str, gate: str, up: str, down: str) -> Names:
    """Returns Llama's names with those of experts in each layer; `{}` stands for their number."""
    experts: Modules = {
        router: "feed_forward.router",
        gate: "feed_forward.w_gate",
        up: "feed_forward.w_up",
        down: "feed_forward.w_down",
    }
    return Names(ENDS, {**PRE_NORMS, **ATTENTION, **QK_NORMS, **experts})


_QWEN = _names("mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
_W1_TO_W3 = (f"block_sparse_moe.experts.{{}}.w{number}" for number in (1, 3, 2))


def _numbers(
    experts: str, *, of: int, active: int, width: str = "intermediate_size", width_default: Any = Required
) -> tuple[Trait, ...]:
    """Returns the traits of the numbers of experts, and of their width."""
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
    return (
        key(experts, "feed_forward.n_experts", default=of, also=(other[experts],)),
        key("num_experts_per_tok", "feed_forward.active", default=active),
        key(width, "feed_forward.hidden_dim", default=width_default),
        SILU,
    )


def _other_layers(hf: Hf) -> str | None:
    """Qwen may have layers without experts, or windows."""
    usual: dict[str, tuple[Any, ...]] = {
        "mlp_only_layers": (None, []),
        "decoder_sparse_step": (1,),
        "use_sliding_window": (None, False),
    }
    wrong = [f"{name} is {hf[name]}" for name, values in usual.items() if hf[name] not in values]
    return f"{wrong[0]}; only models with experts in all layers, and without windows, are read" if wrong else None


_NORMALISE = switch("norm_topk_prob", "feed_forward.normalise", default=False)

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _names("block_sparse_moe.gate", *_W1_TO_W3),
    (
        *(*sizes(longest=131_072), Heads(width="head_dim", kv_default=8), eps(1e-5), Rope(theta=1e6), window(None)),
        *_numbers("num_local_experts", of=8, active=2),
    ),
    FIXED | {"feed_forward.normalise": True},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _QWEN,
    (
        *(*sizes(longest=32_768), Heads(width="head_dim", kv_default=4), eps(1e-6, QK_EPS), Rope(), ATTENTION_BIAS),
        *(*_numbers("num_experts", of=128, active=8, width="moe_intermediate_size", width_default=768), _NORMALISE),
        key("mlp_only_layers", type=list[NonNegativeInt] | None, default=None),
        key("decoder_sparse_step", type=PositiveInt, default=1),
        switch("use_sliding_window", default=False),
    ),
    FIXED | QK_NORM,
    problem=_other_layers,
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _QWEN,
    (
        *(*sizes(longest=4096), Heads(), eps(1e-5, QK_EPS), Rope(), ATTENTION_BIAS),
        *(*_numbers("num_experts", of=64, active=8), _NORMALISE),
        key("clip_qkv", type=float | None, default=None),  # after the norms, where ours clips before
    ),
    FIXED | {"attention.qk_norm": {"kind": "rms"}, "attention.qk_norm_over": "all"},
    problem=no_clip,
)
