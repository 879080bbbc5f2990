"""GPT-J, GPT-NeoX and those after them: LayerNorm and rotary positions, most with parallel branches."""

from dataclasses import dataclass, replace
from math import nextafter
from typing import Any

from triplane.hf.families.classic import gpt_sizes
from triplane.hf.families.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    GATED,
    INNER,
    MLP_BIAS,
    PRE_NORMS,
    SILU,
    eps,
    window,
)
from triplane.hf.family import Family, sizes
from triplane.hf.rope import Rope
from triplane.hf.tensors import QKV, Holds, Names
from triplane.hf.traits import (
    Choice,
    Heads,
    Hf,
    Optional,
    Size,
    Trait,
    Values,
    activation,
    key,
    must_be,
    number,
    switch,
)
from triplane.model.config import ModelConfig
from triplane.storage.errors import ModelError

_LAYER = {"norm.kind": "layer"}
_PLAIN = {**_LAYER, "feed_forward.kind": "plain"}
_SHARED = {"residual": "parallel_shared_norm"}
_LAYER_EPS = "layer_norm_eps"


@dataclass(frozen=True)
class GptjRotary(Trait):
    """The first `rotary_dim` dims of a head turn with their neighbours."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {"rotary_dim": (Size, 64)}

    def read(self, hf: Hf, model: Values) -> None:
        turning, width = hf["rotary_dim"], model["attention"]["head_dim"]
        if turning > width:
            raise ModelError(f"rotary_dim ({turning}) is over the width of a head ({width})")
        fraction = turning / width
        exact = fraction if int(width * fraction) == turning else nextafter(fraction, 1.0)
        model["positions"] = {"kind": "rotary", "fraction": exact, "interleaved": True}

    def write(self, model: Values, hf: Hf) -> None:
        hf["rotary_dim"] = int(model["attention"]["head_dim"] * model["positions"].get("fraction", 1.0))


GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    Names(
        {"transformer.wte": "embedding", "transformer.ln_f": "norm", "lm_head": "head"},
        {
            "ln_1": "attention_norm",
            "attn.q_proj": "attention.wq",
            "attn.k_proj": "attention.wk",
            "attn.v_proj": "attention.wv",
            "attn.out_proj": "attention.wo",
            "mlp.fc_in": "feed_forward.w_up",
            "mlp.fc_out": "feed_forward.w_down",
        },
        layers="transformer.h",
        base="transformer.",
        buffers=("attn.bias", "attn.masked_bias"),
    ),
    (
        *gpt_sizes(longest=2048),
        *(Heads("n_head", also=("num_attention_heads",), kv_heads=None, dim="n_embd"), GptjRotary()),
        key("n_inner", "feed_forward.hidden_dim", type=Size | None, default=lambda hf: 4 * hf["n_embd"]),
        *(activation("activation_function", "gelu_new"), number("layer_norm_epsilon", "norm.eps", default=1e-5)),
    ),
    {**_PLAIN, **_SHARED, "feed_forward.bias": True, "head_bias": True},
)
_FUSED: dict[str, str | Holds] = {
    "query_key_value": Holds(QKV, join="groups"),
    "dense": "attention.wo",
}
_FOUR = {"mlp.dense_h_to_4h": "feed_forward.w_up", "mlp.dense_4h_to_h": "feed_forward.w_down"}
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    Names(
        {"gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "norm", "embed_out": "head"},
        {**PRE_NORMS, **{f"attention.{name}": held for name, held in _FUSED.items()}, **_FOUR},
        layers="gpt_neox.layers",
        base="gpt_neox.",
        buffers=("attention.bias", "attention.masked_bias"),
    ),
    (
        *(*sizes(longest=2048), Heads(kv_heads=None), INNER, activation("hidden_act", "gelu")),
        *(eps(1e-5, name=_LAYER_EPS), replace(ATTENTION_BIAS, default=True)),
        Rope(fraction=0.25, theta_key="rotary_emb_base", fraction_key="rotary_pct"),
        Choice(
            {(True,): {"residual": "parallel"}, (False,): {"residual": "serial"}}, ("use_parallel_residual",), (True,)
        ),
    ),
    {**_PLAIN, "feed_forward.bias": True},
)
PHI = Family(
    "phi",
    "PhiForCausalLM",
    Names(
        {"model.embed_tokens": "embedding", "model.final_layernorm": "norm", "lm_head": "head"},
        {
            "input_layernorm": "attention_norm",
            "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk",
            "self_attn.v_proj": "attention.wv",
            "self_attn.dense": "attention.wo",
            "self_attn.q_layernorm": "attention.q_norm",
            "self_attn.k_layernorm": "attention.k_norm",
            "mlp.fc1": "feed_forward.w_up",
            "mlp.fc2": "feed_forward.w_down",
        },
    ),
    (
        *(*sizes(longest=2048), Heads(), INNER, activation("hidden_act", "gelu_new"), Rope(fraction=0.5)),
        Optional("qk_layernorm", "attention.qk_norm", lambda: {"kind": "layer"}),
        eps(1e-5, "attention.qk_norm.eps", name=_LAYER_EPS),
    ),
    {
        **_PLAIN,
        **_SHARED,
        "attention.qkv_bias": True,
        "attention.output_bias": True,
        "feed_forward.bias": True,
        "head_bias": True,
    },
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    Names(
        ENDS,
        {
            **PRE_NORMS,
            "self_attn.qkv_proj": Holds(QKV),
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_up_proj": Holds(("feed_forward.w_gate", "feed_forward.w_up")),
            "mlp.down_proj": "feed_forward.w_down",
        },
    ),
    (
        *(*sizes(longest=4096), Heads(width="head_dim"), INNER, SILU, eps(1e-5), window(None)),
        Rope(fraction=1.0, scalings=()),
    ),
    {"norm.kind": "rms", "feed_forward.kind": "gated"},
)
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    Names(ENDS, {**PRE_NORMS, **ATTENTION, "mlp.c_fc": "feed_forward.w_up", "mlp.c_proj": "feed_forward.w_down"}),
    (
        *(
            *sizes(longest=4096, tied=True, std=0.018042),
            Heads(width="head_dim", kv_default=2),
            INNER,
            Rope(),
            window(None),
        ),
        *(activation("hidden_act", "gelu_pytorch_tanh"), eps(1e-5, name="norm_epsilon")),
        switch("use_bias", "attention.qkv_bias", "attention.output_bias", "feed_forward.bias", default=True),
    ),
    _PLAIN,
)
STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    Names(ENDS, {**PRE_NORMS, **ATTENTION, **GATED}),
    (
        *(*sizes(longest=4096), Heads(kv_default=32), INNER, SILU, eps(1e-5, name=_LAYER_EPS), Rope(fraction=0.25)),
        *(switch("use_qkv_bias", "attention.qkv_bias", default=False), must_be("qk_layernorm", False)),
        Choice({(True,): _SHARED, (False,): {"residual": "serial"}}, ("use_parallel_residual",), (False,)),
    ),
    {**_LAYER, "feed_forward.kind": "gated"},
)
NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    Names(
        ENDS,
        {**PRE_NORMS, **ATTENTION, "mlp.up_proj": "feed_forward.w_up", "mlp.down_proj": "feed_forward.w_down"},
    ),
    (
        *(*sizes(longest=4096, std=0.0134), Heads(width="head_dim"), INNER, activation("hidden_act", "relu2")),
        *(eps(1e-5, name="norm_eps"), Rope(fraction=0.5), ATTENTION_BIAS, MLP_BIAS),
    ),
    {**_PLAIN, "norm.unit_offset": True},
)


@dataclass(frozen=True)
class FalconBlock(Trait):
    """Falcon's three ways to share key heads and norms."""

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        return {
            "num_kv_heads": (Size | None, None),
            "new_decoder_architecture": (bool | None, False),
            "multi_query": (bool | None, True),
            "parallel_attn": (bool | None, True),
            "num_ln_in_parallel_attn": (int | None, None),
        }

    def read(self, hf: Hf, model: Values) -> None:
        heads, new, parallel = hf["num_attention_heads"], hf["new_decoder_architecture"], hf["parallel_attn"]
        norms = hf["num_ln_in_parallel_attn"] or (2 if new else 1)
        shared = (hf["num_kv_heads"] or heads) if new else 1 if hf["multi_query"] else heads
        if norms not in (1, 2) or (norms == 2 and not (new and parallel)) or (new and not parallel):
            raise ModelError(
                f"new_decoder_architecture {bool(new)}, parallel_attn {bool(parallel)} and num_ln_in_parallel_attn "
                f"{norms}: transformers has no such block"
            )
        if heads % shared:
            raise ModelError(f"num_attention_heads ({heads}) is not a multiple of num_kv_heads ({shared})")
        model["attention"]["n_kv_heads"] = shared
        model["residual"] = "serial" if not parallel else "parallel" if norms == 2 else "parallel_shared_norm"

    def write(self, model: Values, hf: Hf) -> None:
        residual, shared, heads = model["residual"], model["attention"]["n_kv_heads"], model["attention"]["n_heads"]
        new = residual == "parallel" or (residual == "parallel_shared_norm" and 1 < shared < heads)
        hf |= {
            "num_kv_heads": shared,
            "new_decoder_architecture": new,
            "multi_query": shared == 1,
            "parallel_attn": residual != "serial",
            "num_ln_in_parallel_attn": 2 if residual == "parallel" else 1 if new else None,
        }


def _falcon_names(config: ModelConfig) -> Names:
    two = config.residual == "parallel"
    norms = {"ln_attn": "attention_norm", "ln_mlp": "feed_forward_norm"} if two else PRE_NORMS
    return Names(
        {"transformer.word_embeddings": "embedding", "transformer.ln_f": "norm", "lm_head": "head"},
        {**norms, **{f"self_attention.{name}": held for name, held in _FUSED.items()}, **_FOUR},
        layers="transformer.h",
        base="transformer.",
    )


FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    _falcon_names,
    (
        *(*sizes(longest=2048, tied=True, dim_also=("n_embed",)), Heads(kv_heads=None), FalconBlock(), Rope()),
        key("ffn_hidden_size", "feed_forward.hidden_dim", type=Size | None, default=lambda hf: 4 * hf["hidden_size"]),
        *(activation("activation", "gelu"), number("layer_norm_epsilon", "norm.eps", default=1e-5)),
        switch("bias", "attention.qkv_bias", "attention.output_bias", "feed_forward.bias", default=False),
        must_be("alibi", False),
    ),
    _PLAIN,
)
