"""Counts from the config against the module itself."""

from typing import Any

import pytest
import torch
from small_models import packed, random_documents, small_config, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from triplane.model.count import count_parameters, flops_per_token
from triplane.model.transformer import Transformer

FURTHER = {"predict_further": {"depth": 2}}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"head_dim": 16, "n_kv_heads": 6}, FURTHER], ids=str)
def test_parameters_are_those_of_the_module(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    with torch.device("meta"):
        assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_a_published_size() -> None:
    """Llama 3.1 8B has 8,030,261,248 parameters."""
    heads = {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128}
    config = small_config(vocab_size=128_256, dim=4096, n_layers=32, hidden_dim=14_336, **heads)
    assert count_parameters(config) == 8_030_261_248


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"head_dim": 16, "n_kv_heads": 6}, FURTHER], ids=str)
def test_flops_are_those_of_the_operators(changes: dict[str, Any]) -> None:
    config, seq_len = small_config(**changes), 32
    batch = packed(random_documents(config, [seq_len, seq_len]))
    # The counter sees matrix products, so attention must run as such; the mask saves none of them.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        small_model(config)(batch.ahead(config.n_blocks - config.n_layers)).objective.backward()
    assert flops_per_token(config, seq_len) == counter.get_total_flops() / (2 * seq_len)
