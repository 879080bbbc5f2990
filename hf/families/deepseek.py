"""DeepSeek-V2 and V3: latent attention, and experts after some dense layers."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from triplane.hf.dense_layers import FirstDense
from triplane.hf.families.llama import ENDS, GATED, PRE_NORMS, SILU, eps
from triplane.hf.family import Family, sizes
from triplane.hf.rope import Rope, found
from triplane.hf.tensors import Holds, Names
from triplane.hf.traits import Hf, Size, Trait, Values, key, must_be, number, switch
from triplane.model.config import ModelConfig
from triplane.storage.errors import ModelError

_LATENT: dict[str, str | Holds] = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.q_a_proj": "attention.w_dq",
    "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.w_uq",
    "self_attn.kv_a_proj_with_mqa": Holds(("attention.w_dkv", "attention.w_kr")),
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.w_ukv",
    "self_attn.o_proj": "attention.wo",
}
_EXPERTS = {
    "mlp.gate": "feed_forward.router",
    **{f"mlp.experts.{{}}.{name}_proj": f"feed_forward.w_{name}" for name in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{name}_proj": f"feed_forward.always.w_{name}" for name in ("gate", "up", "down")},
}


_FURTHER = {"enorm": "embedding_norm", "hnorm": "stream_norm", "eh_proj": "join", "shared_head.norm": "norm"}
"""Maps the modules that predict further, which checkpoints hold as layers after the others."""
_COPIES = (("embed_tokens", "embedding"), ("shared_head.head", "head"))


def _names(config: ModelConfig) -> Names:
    layer = {**PRE_NORMS, **_LATENT, **GATED, **_EXPERTS, **_FURTHER}
    states = (("mlp.gate.e_score_correction_bias", "feed_forward.router.selection_bias"),)
    others = (f"model.layers.{config.n_layers}.",) if config.predict_further is None else ()
    return Names(ENDS, layer, states=states, copies=_COPIES, others=others)


@dataclass(frozen=True)
class _Rope(Rope):
    """`mscale_all_dim` multiplies the scores as well; stands after the dims of heads."""

    def read(self, hf: Hf, model: Values) -> None:
        super().read(hf, model)
        scaling, sharper = model["positions"]["scaling"], found(hf).mscale_all_dim
        if scaling is not None and sharper:
            factor = 0.1 * sharper * math.log(scaling["factor"]) + 1
            model["attention"]["scale"] = _query_dim(hf) ** -0.5 * factor**2

    def write(self, model: Values, hf: Hf) -> None:
        super().write(model, hf)
        scaling = hf["rope_scaling"]
        factor = (model["attention"]["scale"] * _query_dim(hf) ** 0.5) ** 0.5
        if scaling is not None and not math.isclose(factor, 1):
            own = {"mscale_all_dim": (factor - 1) / (0.1 * math.log(scaling["factor"]))}
            hf["rope_scaling"] |= own
            hf["rope_parameters"] |= own


def _query_dim(hf: Hf) -> int:
    width: int = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    return width


@dataclass(frozen=True)
class _Groups(Trait):
    """Groups of experts, ranked by their best one, where `topk_method` says so (V2)."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        methods = Literal["greedy", "group_limited_greedy"]
        sizes = dict.fromkeys(("n_group", "topk_group"), (PositiveInt | None, None))
        return {"topk_method": (methods, "greedy"), **sizes}

    def read(self, hf: Hf, model: Values) -> None:
        groups, active = hf["n_group"], hf["topk_group"]
        if hf["topk_method"] == "greedy" or groups == 1:
            return
        if groups is None or active is None:
            raise ModelError(f"topk_method is {hf['topk_method']!r}, but n_group {groups} and topk_group {active}")
        model["feed_forward"] |= {"groups": groups, "active_groups": active, "group_best": 1}

    def write(self, model: Values, hf: Hf) -> None:
        part = model["feed_forward"]
        hf["topk_method"] = "group_limited_greedy" if part.get("groups", 1) > 1 else "greedy"
        hf["n_group"], hf["topk_group"] = part.get("groups"), part.get("active_groups")


def _other_heads(hf: Hf) -> str | None:
    """Each head has a key and a value of its own."""
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    if kv_heads in (None, heads):
        return None
    return f"num_key_value_heads is {kv_heads}, num_attention_heads {heads}; this family has as many"


_ATTENTION = (
    key("num_attention_heads", "attention.n_heads"),
    key("num_key_value_heads", type=Size | None, default=lambda hf: hf["num_attention_heads"]),
    key("q_lora_rank", "attention.q_rank", type=Size | None, default=1536),
    key("kv_lora_rank", "attention.kv_rank", default=512),
    key("qk_nope_head_dim", "attention.nope_dim", default=128),
    key("qk_rope_head_dim", "attention.rope_dim", default=64),
    key("v_head_dim", "attention.v_dim", default=128),
    must_be("attention_bias", value=False),
)
_FIXED = {
    "norm.kind": "rms",
    "attention.kind": "latent",
    "attention.norm": {"kind": "rms", "eps": 1e-6},
    "feed_forward.kind": "experts",
}


def _experts(*, of: int, active: Any, width: int, shared: int, scale: float) -> tuple[Trait, ...]:
    return (
        key("n_routed_experts", "feed_forward.n_experts", default=of, also=("num_experts", "num_local_experts")),
        key("num_experts_per_tok", "feed_forward.active", type=PositiveInt, default=active),
        key("moe_intermediate_size", "feed_forward.hidden_dim", default=width),
        key("n_shared_experts", "feed_forward.shared", default=shared),
        number("routed_scaling_factor", "feed_forward.routed_scale", default=scale),
        SILU,
    )


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _names,
    (
        *(*sizes(longest=4096), *_ATTENTION, eps(1e-6), _Rope()),
        switch("rope_interleave", "positions.interleaved", default=True),
        FirstDense(width=18_432, count=3),
        *_experts(of=256, active=8, width=2048, shared=1, scale=2.5),
        key("n_group", "feed_forward.groups", default=8),
        key("topk_group", "feed_forward.active_groups", default=4),
        switch("norm_topk_prob", "feed_forward.normalise", default=True),
        key(
            "num_nextn_predict_layers",
            "predict_further",
            type=NonNegativeInt,
            default=1,
            decode=lambda depth: {"depth": depth} if depth else None,
            encode=lambda table: table["depth"] if table else 0,
        ),
    ),
    _FIXED | {"feed_forward.router": "sigmoid", "feed_forward.balance": {"kind": "bias"}},
    zero_biases=True,
    problem=_other_heads,
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _names,
    (
        *(*sizes(longest=2048), *_ATTENTION, eps(1e-6), _Rope(interleaved=True)),
        FirstDense(width=11_008, count=0),
        *_experts(of=64, active=8, width=1407, shared=2, scale=1.0),
        _Groups(),
        *(must_be("norm_topk_prob", value=False), must_be("mlp_bias", value=False)),
    ),
    _FIXED | {"feed_forward.router": "softmax", "feed_forward.normalise": False},
    problem=_other_heads,
)
