"""The description of a network in its config against the network itself, for every option."""

import json
import random
from typing import Any

import pytest
import torch

from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.model.describe import model_weights
from triplane.model.transformer import Transformer
from triplane.prove.networks import OPTIONS, network, valid_network
from triplane.prove.reference import proof_model

ALONE = [(name,) for options in OPTIONS.values() for name in options]


def mixed(number: int) -> tuple[str, ...]:
    """Returns an option of every part, of those that go together."""
    draw = random.Random(number)
    while True:
        chosen = tuple(draw.choice(list(options)) for options in OPTIONS.values())
        if valid_network(proof_model(), chosen):
            return chosen


NETWORKS = [(), *ALONE, *(mixed(number) for number in range(20))]


@pytest.mark.parametrize("options", NETWORKS, ids=", ".join)
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_described_are_those_built(options: tuple[str, ...], tied: bool) -> None:
    config = network(proof_model(tied), options)
    with torch.device("meta"):
        built = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
    assert {name: weight.shape for name, weight in model_weights(config).items()} == built
    assert count_parameters(config) == sum(torch.Size(shape).numel() for shape in built.values())


@pytest.mark.parametrize("options", NETWORKS, ids=", ".join)
def test_configs_survive_json(options: tuple[str, ...]) -> None:
    config = network(proof_model(), options)
    content = json.loads(json.dumps(config.model_dump(mode="json")))
    assert ModelConfig.model_validate(content) == config
    assert ModelConfig.model_validate(content, strict=True) == config


SHORT: dict[str, tuple[str, str, Any]] = {
    "n_heads": ("attention", "n_heads", 6),
    "n_kv_heads": ("attention", "n_kv_heads", 3),
    "head_dim": ("attention", "head_dim", 8),
    "qkv_bias": ("attention", "qkv_bias", True),
    "hidden_dim": ("feed_forward", "hidden_dim", 40),
    "rope_base": ("positions", "base", 77.0),
    "rope_scaling": ("positions", "scaling", {"kind": "linear", "factor": 2.0}),
    "norm_eps": ("norm", "eps", 0.25),
}


def test_short_keys_equal_their_tables() -> None:
    assert SHORT.keys() == ModelConfig.short_keys.keys()
    ends = {"vocab_size": 10, "dim": 48, "n_layers": 2}
    tables: dict[str, dict[str, Any]] = {}
    for table, key, value in SHORT.values():
        tables.setdefault(table, {})[key] = value
    long = ModelConfig.model_validate({**ends, **tables})
    assert ModelConfig.model_validate(ends | {short: value for short, (_, _, value) in SHORT.items()}) == long
    for short, (table, key, value) in SHORT.items():  # one short, the others in their tables
        rest = {name: {k: v for k, v in keys.items() if (name, k) != (table, key)} for name, keys in tables.items()}
        assert ModelConfig.model_validate({**ends, **rest, short: value}) == long
        assert getattr(getattr(long, table), key) == (long.positions.scaling if short == "rope_scaling" else value)
