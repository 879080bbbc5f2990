"""BLOOM and MPT: LayerNorm, a plain feed-forward part, ALiBi."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, PositiveFloat

from triplane.hf.families.classic import BIASES, EPS, FIXED
from triplane.hf.family import Family, sizes
from triplane.hf.tensors import QKV, Holds, Names
from triplane.hf.traits import Heads, Hf, Trait, Values, key, must_be, number
from triplane.storage.errors import ModelError


def _four_times(model: Values) -> Values:
    return {"feed_forward.hidden_dim": 4 * model["dim"]}


BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    Names(
        {
            "transformer.word_embeddings": "embedding",
            "transformer.word_embeddings_layernorm": "embedding_norm",
            "transformer.ln_f": "norm",
            "lm_head": "head",
        },
        {
            "input_layernorm": "attention_norm",
            "self_attention.query_key_value": Holds(QKV, join="groups"),
            "self_attention.dense": "attention.wo",
            "post_attention_layernorm": "feed_forward_norm",
            "mlp.dense_h_to_4h": "feed_forward.w_up",
            "mlp.dense_4h_to_h": "feed_forward.w_down",
        },
        layers="transformer.h",
        base="transformer.",
    ),
    (
        *sizes(layers="n_layer", context="seq_length", longest=2048, tied=True, dim_also=("n_embed",),
               layers_also=("num_hidden_layers",)),
        Heads("n_head", also=("num_attention_heads",), kv_heads=None),
        number("layer_norm_epsilon", "norm.eps", "embedding_norm.eps", default=1e-5),
        must_be("apply_residual_connection_post_layernorm", False),
    ),
    {
        **FIXED, **BIASES, "feed_forward.activation": "gelu_tanh",
        "embedding_norm": {"kind": "layer"},
        "positions": {"kind": "alibi"},
    },
    _four_times,
)  # fmt: skip


class _MptAttention(BaseModel, strict=True, frozen=True, allow_inf_nan=False):
    clip_qkv: PositiveFloat | None = None
    softmax_scale: PositiveFloat | None = None
    alibi: bool = True
    alibi_bias_max: float = 8
    prefix_lm: bool = False
    qk_ln: bool = False
    attn_type: str = "multihead_attention"


@dataclass(frozen=True)
class MptAttention(Trait):
    """The table `attn_config`. Whatever it says, transformers computes ALiBi with 8, of equal heads."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {"attn_config": (_MptAttention | None, None)}

    def read(self, hf: Hf, model: Values) -> None:
        theirs = hf["attn_config"] or _MptAttention()
        model["attention"] |= {"clip_qkv": theirs.clip_qkv, "scale": theirs.softmax_scale}
        usual = _MptAttention(clip_qkv=theirs.clip_qkv, softmax_scale=theirs.softmax_scale)
        for name in _MptAttention.model_fields:
            if getattr(theirs, name) != getattr(usual, name):
                raise ModelError(
                    f"attn_config.{name} is {getattr(theirs, name)}; transformers computes {getattr(usual, name)}"
                )

    def write(self, model: Values, hf: Hf) -> None:
        attention = model["attention"]
        content = _MptAttention(clip_qkv=attention.get("clip_qkv"), softmax_scale=attention["scale"])
        hf["attn_config"] = content.model_dump() | {"alibi_bias_max": 8}


MPT = Family(
    "mpt",
    "MptForCausalLM",
    Names(
        {"transformer.wte": "embedding", "transformer.norm_f": "norm", "lm_head": "head"},
        {
            "norm_1": "attention_norm",
            "attn.Wqkv": Holds(QKV),
            "attn.out_proj": "attention.wo",
            "norm_2": "feed_forward_norm",
            "ffn.up_proj": "feed_forward.w_up",
            "ffn.down_proj": "feed_forward.w_down",
        },
        layers="transformer.blocks",
        base="transformer.",
    ),
    (
        *sizes("d_model", "n_layers", "max_seq_len", longest=2048, tied=True, dim_also=("hidden_size",),
               layers_also=("num_hidden_layers",)),
        Heads("n_heads", also=("num_attention_heads",), kv_heads=None, dim="d_model"),
        *(EPS, MptAttention(), must_be("no_bias", True)),
        key("expansion_ratio", type=int, default=4),
        key("logit_scale", type=float | str | None, default=None),
    ),
    {
        **FIXED, "norm.bias": False, "feed_forward.bias": False, "feed_forward.activation": "gelu",
        "positions": {"kind": "alibi"},
    },
    _four_times,
    problem=lambda hf: next(
        (
            f"{name} is {hf[name]}; transformers computes {usual}"
            for name, usual in (("expansion_ratio", 4), ("logit_scale", None))
            if hf[name] != usual
        ),
        None,
    ),
)  # fmt: skip
