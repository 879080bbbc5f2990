"""Families with sparse experts and softmax attention."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from triplane.hf.dense_layers import ListedDense
from triplane.hf.families.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    GATED,
    MULTIPLIERS,
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
from triplane.hf.layer_kinds import Windows, every
from triplane.hf.rope import Rope
from triplane.hf.tensors import Holds, Names
from triplane.hf.traits import Heads, Hf, Required, Trait, Values, key, must_be, number, switch
from triplane.storage.errors import ModelError

FIXED = {"norm.kind": "rms", "feed_forward.kind": "experts", "feed_forward.router": "softmax"}


_LAYER: dict[str, str] = {**PRE_NORMS, **ATTENTION, **QK_NORMS}
_GATED = ("gate", "up", "down")
_MIXTRAL = {
    "block_sparse_moe.gate": "feed_forward.router",
    **{f"block_sparse_moe.experts.{{}}.w{n}": f"feed_forward.w_{name}" for n, name in zip((1, 3, 2), _GATED)},
}
_QWEN = {
    **GATED,
    "mlp.gate": "feed_forward.router",
    **{f"mlp.experts.{{}}.{name}_proj": f"feed_forward.w_{name}" for name in _GATED},
    **{f"mlp.shared_expert.{name}_proj": f"feed_forward.always.w_{name}" for name in _GATED},
    "mlp.shared_expert_gate": "feed_forward.always.weigh",
}
"""Modules of a layer, dense or with experts; `{}` stands for the number of an expert."""
_GRANITE: dict[str, str | Holds] = {
    "block_sparse_moe.router.layer": "feed_forward.router",
    "block_sparse_moe.input_linear": Holds(("feed_forward.w_gate", "feed_forward.w_up"), stacked=True),
    "block_sparse_moe.output_linear": Holds(("feed_forward.w_down",), stacked=True),
    "shared_mlp.input_linear": Holds(("feed_forward.always.w_gate", "feed_forward.always.w_up")),
    "shared_mlp.output_linear": "feed_forward.always.w_down",
}
_LEAVES = ("", "_bias")
_GPT_OSS: dict[str, str | Holds] = {
    "mlp.router": "feed_forward.router",
    "mlp.experts.gate_up_proj": Holds(
        ("feed_forward.w_gate", "feed_forward.w_up"), join="pairs", stacked=True, transposed=True, leaves=_LEAVES
    ),
    "mlp.experts.down_proj": Holds(("feed_forward.w_down",), stacked=True, transposed=True, leaves=_LEAVES),
}


def _numbers(
    experts: str, *, of: int, active: int, width: str = "intermediate_size", width_default: Any = Required
) -> tuple[Trait, ...]:
    """Returns the traits of the numbers of experts, and of their width."""
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
    return (
        key(experts, "feed_forward.n_experts", default=of, also=(other[experts],)),
        key("num_experts_per_tok", "feed_forward.active", default=active),
        key(width, "feed_forward.hidden_dim", default=width_default),
    )


@dataclass(frozen=True)
class SharedWidth(Trait):
    """The width of the experts that all tokens pass, a multiple of an expert's; stands after that."""

    name: str
    default: int

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {self.name: (Annotated[int, Field(ge=0, le=2**20)], self.default)}

    def read(self, hf: Hf, model: Values) -> None:
        width, each = hf[self.name], model["feed_forward"]["hidden_dim"]
        if width % each:
            raise ModelError(f"{self.name} ({width}) is not a multiple of the width of an expert ({each})")
        model["feed_forward"]["shared"] = width // each

    def write(self, model: Values, hf: Hf) -> None:
        part = model["feed_forward"]
        hf[self.name] = part.get("shared", 0) * part["hidden_dim"]


_NORMALISE = switch("norm_topk_prob", "feed_forward.normalise", default=False)
_NO_WINDOW = must_be("use_sliding_window", value=False)

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    Names(ENDS, {**_LAYER, **_MIXTRAL}),
    (
        *(*sizes(longest=131_072), Heads(width="head_dim", kv_default=8), eps(1e-5), Rope(theta=1e6), window(None)),
        *(*_numbers("num_local_experts", of=8, active=2), SILU),
    ),
    FIXED | {"feed_forward.normalise": True},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    Names(ENDS, {**_LAYER, **_QWEN}),
    (
        *(*sizes(longest=32_768), Heads(width="head_dim", kv_default=4), eps(1e-6, QK_EPS), Rope(), ATTENTION_BIAS),
        ListedDense(width=6144),
        *_numbers("num_experts", of=128, active=8, width="moe_intermediate_size", width_default=768),
        *(SILU, _NORMALISE, _NO_WINDOW),
    ),
    FIXED | QK_NORM,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    Names(ENDS, {**_LAYER, **_QWEN}),
    (
        *(*sizes(longest=32_768), Heads(width="head_dim", kv_default=16), eps(1e-6), Rope()),
        switch("qkv_bias", "attention.qkv_bias", default=True),
        ListedDense(width=5632),
        *_numbers("num_experts", of=60, active=4, width="moe_intermediate_size", width_default=1408),
        SharedWidth("shared_expert_intermediate_size", default=5632),
        *(SILU, _NORMALISE, _NO_WINDOW),
    ),
    FIXED | {"feed_forward.shared_gate": True},
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    Names(ENDS, {**_LAYER, **_QWEN}),
    (
        *(*sizes(longest=4096), Heads(), eps(1e-5, QK_EPS), Rope(), ATTENTION_BIAS),
        *(*_numbers("num_experts", of=64, active=8), SILU, _NORMALISE),
        key("clip_qkv", type=float | None, default=None),  # after the norms, where ours clips before
    ),
    FIXED | {"attention.qk_norm": {"kind": "rms"}, "attention.qk_norm_over": "all"},
    problem=no_clip,
)
_GRANITE_TRAITS = (
    *(*sizes(longest=2048), Heads(width="head_dim"), eps(1e-6), Rope(), ATTENTION_BIAS, *MULTIPLIERS),
    *(*_numbers("num_local_experts", of=8, active=2, width_default=11_008), SILU),
)
GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    Names(ENDS, {**_LAYER, **_GRANITE}),
    _GRANITE_TRAITS,
    FIXED | {"feed_forward.normalise": True},
)
GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    traits=(*_GRANITE_TRAITS, SharedWidth("shared_intermediate_size", default=0)),
)
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    Names(ENDS, {**_LAYER, **_GPT_OSS}, states=(("self_attn.sinks", "attention.sinks"),)),
    (
        *(*sizes(longest=131_072), Heads(width="head_dim", kv_default=8, width_default=64), eps(1e-5)),
        Rope(theta=150_000.0, absent={"kind": "yarn", "factor": 32.0, "original_seq_len": 4096, "truncate": False}),
        switch("attention_bias", "attention.qkv_bias", "attention.output_bias", default=True),
        Windows(every(2), window=128),
        *_numbers("num_local_experts", of=128, active=4, width_default=2880),
        key("swiglu_alpha", type=Annotated[float, Field(ge=1.702, le=1.702)], default=1.702),
        number("swiglu_limit", "feed_forward.clamp", default=7.0),
    ),
    FIXED
    | {"attention.sinks": True, "feed_forward.normalise": True}
    | {"feed_forward.bias": True, "feed_forward.router_bias": True}
    | {"feed_forward.activation": "gelu_sigmoid", "feed_forward.up_offset": 1.0},
)
