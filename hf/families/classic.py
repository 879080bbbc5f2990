"""GPT-2 and those after it: LayerNorm, a plain feed-forward part, learned positions."""

from dataclasses import dataclass
from math import isclose
from typing import Any

from triplane.hf.family import Family, sizes
from triplane.hf.tensors import QKV, Holds, Names
from triplane.hf.traits import Heads, Hf, Size, Trait, Values, activation, key, must_be, number, switch
from triplane.model.config import ModelConfig

FIXED = {"norm.kind": "layer", "feed_forward.kind": "plain"}
BIASES = {"attention.qkv_bias": True, "attention.output_bias": True, "feed_forward.bias": True}
EPS = number("layer_norm_epsilon", "norm.eps", default=1e-5)
_GPT_HEADS = Heads("n_head", also=("num_attention_heads",), kv_heads=None, dim="n_embd")
_INNER = key(
    "n_inner",
    "feed_forward.hidden_dim",
    type=Size | None,
    default=lambda hf: 4 * hf["n_embd"],
)


@dataclass(frozen=True)
class Scaled(Trait):
    """Scores are divided by the root of a head's width, or not at all."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {"scale_attn_weights": (bool, True)}

    def read(self, hf: Hf, model: Values) -> None:
        model["attention"]["scale"] = None if hf["scale_attn_weights"] else 1.0

    def write(self, model: Values, hf: Hf) -> None:
        attention = model["attention"]
        hf["scale_attn_weights"] = isclose(attention["scale"], attention["head_dim"] ** -0.5)


def gpt_sizes(*, longest: int, tied: bool = False) -> tuple[Trait, ...]:
    """Returns the traits of sizes in GPT-2's words."""
    also: Any = {"dim_also": ("hidden_size",), "layers_also": ("num_hidden_layers",)}
    return sizes("n_embd", "n_layer", "n_positions", longest=longest, tied=tied, **also)


@dataclass(frozen=True)
class Learned(Trait):
    """A table of positions as long as the context."""

    offset: int = 0

    def read(self, hf: Hf, model: Values) -> None:
        longest = hf["max_position_embeddings"]
        model["positions"] = {"kind": "learned", "max_seq_len": longest, "offset": self.offset}


def _gpt(matrix: Any) -> Names:
    """Returns GPT-2's names; `matrix` makes the entry of a linear layer of the modules of ours that it holds."""
    return Names(
        {
            "transformer.wte": "embedding",
            "transformer.wpe": "positions.0",
            "transformer.ln_f": "norm",
            "lm_head": "head",
        },
        {
            "ln_1": "attention_norm",
            "attn.c_attn": matrix(QKV),
            "attn.c_proj": matrix(("attention.wo",)),
            "ln_2": "feed_forward_norm",
            "mlp.c_fc": matrix(("feed_forward.w_up",)),
            "mlp.c_proj": matrix(("feed_forward.w_down",)),
        },
        layers="transformer.h",
        base="transformer.",
        buffers=("attn.bias", "attn.masked_bias"),
    )


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _gpt(lambda modules: Holds(modules, transposed=True)),
    (
        *(*gpt_sizes(longest=1024, tied=True), _GPT_HEADS, _INNER, EPS, Learned()),
        *(activation("activation_function", "gelu_new"), Scaled()),
        *(must_be("scale_attn_by_inverse_layer_idx", False), must_be("add_cross_attention", False)),
    ),
    {**FIXED, **BIASES},
    zero_biases=True,
)


@dataclass(frozen=True)
class MultiQuery(Trait):
    """All heads share one key and value head, or none do."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {"multi_query": (bool, True)}

    def read(self, hf: Hf, model: Values) -> None:
        if hf["multi_query"]:
            model["attention"]["n_kv_heads"] = 1

    def write(self, model: Values, hf: Hf) -> None:
        hf["multi_query"] = model["attention"]["n_kv_heads"] == 1


GPT_BIGCODE = Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    _gpt(lambda modules: Holds(modules, join="groups" if modules == QKV else "rows")),
    (
        *(*gpt_sizes(longest=1024, tied=True), _GPT_HEADS, _INNER, EPS, Learned()),
        *(activation("activation_function", "gelu_pytorch_tanh"), Scaled(), MultiQuery()),
        must_be("add_cross_attention", False),
    ),
    {**FIXED, **BIASES},
)


@dataclass(frozen=True)
class NormBefore(Trait):
    """The norm's place in OPT: before each branch, or after the stream (its model of 350 M parameters)."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {"do_layer_norm_before": (bool, True)}

    def read(self, hf: Hf, model: Values) -> None:
        model["norm_placement"] = "pre" if hf["do_layer_norm_before"] else "post"

    def write(self, model: Values, hf: Hf) -> None:
        hf["do_layer_norm_before"] = model["norm_placement"] == "pre"


def _opt_names(config: ModelConfig) -> Names:
    norm = "norm" if config.norm_placement == "pre" else "stream_norm"
    return Names(
        {
            "model.decoder.embed_tokens": "embedding",
            "model.decoder.embed_positions": "positions.0",
            "model.decoder.final_layer_norm": "norm",
            "lm_head": "head",
        },
        {
            "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk",
            "self_attn.v_proj": "attention.wv",
            "self_attn.out_proj": "attention.wo",
            "self_attn_layer_norm": f"attention_{norm}",
            "fc1": "feed_forward.w_up",
            "fc2": "feed_forward.w_down",
            "final_layer_norm": f"feed_forward_{norm}",
        },
        layers="model.decoder.layers",
    )


def _narrow_embedding(hf: Hf) -> str | None:
    inner, dim = hf["word_embed_proj_dim"], hf["hidden_size"]
    if inner in (None, dim):
        return None
    return f"word_embed_proj_dim ({inner}) differs from hidden_size ({dim}); this model has no projection between them"


OPT = Family(
    "opt",
    "OPTForCausalLM",
    _opt_names,
    (
        *(*sizes(longest=2048, tied=True), Heads(kv_heads=None), Learned(offset=2), NormBefore()),
        *(key("ffn_dim", "feed_forward.hidden_dim"), activation("activation_function", "relu")),
        switch("enable_bias", "attention.qkv_bias", "attention.output_bias", "feed_forward.bias", default=True),
        switch("layer_norm_elementwise_affine", "norm.gain", "norm.bias", default=True),
        key("word_embed_proj_dim", type=Size | None, default=None),
        key("remove_final_layer_norm", type=bool, default=False, also=("_remove_final_layer_norm",)),
    ),
    {**FIXED, "norm.eps": 1e-5},
    problem=lambda hf: (
        ("_remove_final_layer_norm is true; this model has that norm" if hf["remove_final_layer_norm"] else None)
        or _narrow_embedding(hf)
    ),
)
