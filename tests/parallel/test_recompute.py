"""Recomputation keeps less: the memory that stands between forward and backward."""

import pytest
from small_models import packed, random_documents, small_config, small_model
from torch.profiler import ProfilerActivity, profile

from triplane.parallel.config import ParallelConfig, Recompute
from triplane.parallel.recompute import apply_recompute

TOKENS, LAYERS, DIM = 512, 6, 48


def kept_bytes(*pattern: Recompute) -> int:
    """Returns the bytes that a forward pass over the blocks allocates on the CPU and does not free."""
    config = small_config(n_layers=LAYERS, dim=DIM, hidden_dim=160)
    model = small_model(config)
    for number, block in model.blocks.items():
        if (how := ParallelConfig(recompute=pattern).recomputed(int(number))) != "none":
            apply_recompute([block], how)
    batch = packed(random_documents(config, [TOKENS]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        hidden = model.hidden(batch)
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in record.key_averages())


def test_selective_keeps_less_and_full_keeps_little_more_than_the_stream_between_blocks() -> None:
    none, selective, full = kept_bytes("none"), kept_bytes("selective"), kept_bytes("full")
    stream = LAYERS * TOKENS * DIM * 4
    assert selective < 0.75 * none
    assert full < 1.5 * stream < 0.1 * none


def test_a_pattern_recomputes_layer_by_layer() -> None:
    """Six layers: two of each kind, whichever comes first."""
    each = [kept_bytes(how) / LAYERS for how in ("none", "selective", "full")]
    assert kept_bytes("selective", "full", "none") == pytest.approx(2 * sum(each), rel=0.02)
    assert kept_bytes("full", "none") == pytest.approx(3 * (each[0] + each[2]), rel=0.02)
