"""Networks that `triplane prove` trains: every kind and option of a part, in few rows that hold every pair of them.

A row is a network and a layout. Each pair of options, and each pair of an option and a choice of layout, is in a row
(a covering array; Cohen et al. 1997), so a mistake in how two of them compose shows.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from triplane.model.config import ModelConfig

_RMS, _LAYER = {"kind": "rms"}, {"kind": "layer"}
_EXPERTS: dict[str, Any] = {"kind": "experts", "n_experts": 8, "active": 2, "hidden_dim": 16}
_LATENT: dict[str, Any] = {"kind": "latent", "n_heads": 8, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "norm": {
        "unit offset": {"norm": {"unit_offset": True}},
        "LayerNorm": {"norm": _LAYER},
        "LayerNorm without weights": {"norm": _LAYER | {"gain": False, "bias": False}},
        "ScaleNorm": {"norm": {"kind": "scale"}},
        "FixNorm": {"norm": {"kind": "fix", "length": 5.0}},
    },
    "residual": {
        "post norms": {"norm_placement": "post"},
        "output norms": {"norm_placement": "output"},
        "sandwich norms": {"norm_placement": "sandwich"},
        "parallel": {"residual": "parallel", "attention": {"output_bias": True}},
        "parallel, one norm": {"residual": "parallel_shared_norm", "residual_scale": 0.5},
    },
    "positions": {
        "partial interleaved rotary": {"positions": {"fraction": 0.5, "interleaved": True}},
        "YaRN": {"positions": {"scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}}},
        "learned positions": {"positions": {"kind": "learned", "max_seq_len": 64, "offset": 2}},
        "sinusoidal": {"positions": {"kind": "sinusoidal"}, "embedding_scale": 5.0},
        "ALiBi": {"positions": {"kind": "alibi"}},
        "T5 bias": {"positions": {"kind": "relative", "buckets": 8, "max_distance": 32}},
        "no positions": {"positions": {"kind": "none"}},
    },
    "queries and keys": {
        "QK-norm": {"attention": {"qk_norm": _RMS}},
        "QK-norm of each head": {"attention": {"qk_norm": _LAYER, "qk_norm_over": "each"}},
        "QK-norm over all heads": {"attention": {"qk_norm": _RMS, "qk_norm_over": "all"}},
        "QK-norm after rotation": {"attention": {"qk_norm": _RMS, "qk_norm_after_rotation": True}},
        "latent": {"attention": _LATENT | {"q_rank": 12}},
        "latent, whole queries, wide values": {"attention": _LATENT | {"v_dim": 20}},
        "clipped, no biases": {"attention": {"clip_qkv": 4.0, "qkv_bias": False}},
    },
    "scores": {
        "window": {"attention": {"window": 12}},
        "soft cap": {"attention": {"softcap": 2.0, "scale": 0.5}},
        "sinks": {"attention": {"sinks": True, "output_bias": True}},
        "every other layer windowed": {"layers": [{"attention": {"window": 7}, "repeat": 2}, {}, {}, {}]},
        "some layers without positions": {"layers": [{}, {}, {}, {}, {"positions": {"kind": "none"}}]},
    },
    "heads": {"one key head": {"attention": {"n_kv_heads": 1}}, "a key head each": {"attention": {"n_kv_heads": 8}}},
    "feed-forward": {
        "GEGLU": {"feed_forward": {"activation": "gelu_tanh", "bias": True}},
        "clamped GLU": {"feed_forward": {"activation": "gelu_sigmoid", "clamp": 7.0, "up_offset": 1.0}},
        "bilinear": {"feed_forward": {"activation": "none"}},
        "GELU": {"feed_forward": {"kind": "plain", "activation": "gelu"}},
        "squared ReLU": {"feed_forward": {"kind": "plain", "activation": "relu_squared", "bias": False}},
        "sigmoid": {"feed_forward": {"kind": "plain", "activation": "sigmoid"}},
        "experts, one shared": {
            "feed_forward": _EXPERTS | {"shared": 1, "balance": {"kind": "loss", "weight": 0.1}, "z_loss_weight": 0.01}
        },
        "experts in groups": {
            "feed_forward": _EXPERTS
            | {"router": "sigmoid", "groups": 4, "active_groups": 2, "routed_scale": 1.5}
            | {"balance": {"kind": "bias", "rate": 0.02}}
        },
        "experts with biases": {
            "feed_forward": _EXPERTS
            | {"active": 4, "bias": True, "router_bias": True, "normalise": False}
            | {"activation": "gelu_sigmoid", "clamp": 7.0, "up_offset": 1.0}
        },
        "experts after a dense layer": {
            "layers": [{}, {"feed_forward": _EXPERTS | {"shared": 2, "shared_gate": True}, "repeat": 4}]
        },
    },
    "ends": {
        "capped logits": {"embedding_scale": 3.0, "head_softcap": 3.0},
        "two tokens further": {"predict_further": {"depth": 2, "weight": 0.5}},
        "embedding norm, head bias": {"embedding_norm": _LAYER, "head_bias": True, "head_scale": 0.5},
    },
}
"""Changes of the proof's model by part and option; besides, each part may be as it is there.

Few values reach the clamps: at a clamp the gradient jumps, so rounding alone moves a value across now and then.
"""

_TRIES = 20
"""Completions tried for each row."""

Row = dict[str, str]
"""The chosen option of each part or axis that has one."""


@cache
def network(model: ModelConfig, options: tuple[str, ...]) -> ModelConfig:
    """Returns `model` with options; raises ValidationError if they contradict each other."""
    content = model.model_dump(exclude={"layers"})
    changes = [change for named in OPTIONS.values() for name, change in named.items() if name in options]
    # Those of layers last, since a layer holds all options of its parts.
    for change in sorted(changes, key=lambda change: "layers" in change):
        for key, value in change.items():
            content[key] = _merged(content.get(key), value)
    return ModelConfig.model_validate(content)


def _merged(base: Any, changes: Any) -> Any:
    """Returns the table with changes, unless they make it another kind."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    if changes.get("kind", base.get("kind")) == base.get("kind"):
        return base | changes
    return {key: value for key, value in base.items() if key == "hidden_dim"} | changes


Pair = tuple[tuple[str, str], ...]
"""One choice, or two, of (axis, option)."""


def cover(axes: Mapping[str, Sequence[str]], valid: Callable[[Row], bool], wanted: Callable[[Pair], bool]) -> list[Row]:
    """Returns valid rows with every pair of options of two axes that is valid and `wanted`; a row may omit axes."""
    draw = random.Random(0)
    alone = [{axis: option} for axis in axes for option in axes[axis]]
    together = [a | b for a, b in combinations(alone, 2) if a.keys() != b.keys()]
    sound = set().union(*(_pairs(row) for row in [*alone, *together] if valid(row)))

    def completed(row: Row) -> Row:
        others = [axis for axis in axes if axis not in row]
        for axis in draw.sample(others, len(others)):
            tried = row | {axis: draw.choice(axes[axis])}
            if _pairs(tried) <= sound and valid(tried):
                row = tried
        return row

    missing = {pair for pair in sound if wanted(pair)}
    rows: list[Row] = []
    while missing:
        first = min(missing)
        candidates = [completed(dict(first)) for _ in range(_TRIES)]
        rows.append(max(candidates, key=lambda row: len(_pairs(row) & missing)))
        missing -= _pairs(rows[-1])
    return rows


def _pairs(row: Row) -> set[Pair]:
    """Returns each choice of a row alone, and each pair of them."""
    chosen = sorted(row.items())
    return {*combinations(chosen, 1), *combinations(chosen, 2)}


@cache
def valid_network(model: ModelConfig, options: tuple[str, ...]) -> bool:
    """Returns True if the options go together."""
    if sum("layers" in change for named in OPTIONS.values() for name, change in named.items() if name in options) > 1:
        return False  # the changes of one would replace those of the other
    try:
        return not list(network(model, options).problems())
    except ValidationError:
        return False
