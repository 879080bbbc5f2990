"""Every layout trains the same model: loss, gradient norm, weights and moments of 20 steps against one process.

The reference is a plain torch loop over the plain model; see parity.py for it and for Adam's eps.
"""

import pytest
import torch
from parity import LAYOUTS, TOLERANCE, Trace, max_difference, model_config, reference, train
from ranks import run_ranks

from triplane.model.config import ModelConfig
from triplane.parallel import tensor


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def expected(request: pytest.FixtureRequest) -> tuple[ModelConfig, Trace]:
    config = model_config(tied=request.param)
    return config, reference(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_the_same_model(name: str, expected: tuple[ModelConfig, Trace]) -> None:
    layout, ranks = LAYOUTS[name]
    config, one = expected
    for trace in run_ranks(layout, ranks, train, config, layout):
        assert max_difference(trace, one) < TOLERANCE


@pytest.mark.parametrize("name", ["zero1", "zero1 dp2", "zero1 tp2", "zero1 pp2", "zero1 tp2 pp2"])
def test_bf16_follows_fp32(name: str, expected: tuple[ModelConfig, Trace]) -> None:
    layout, ranks = LAYOUTS[name]
    config, one = expected
    for trace in run_ranks(layout, ranks, train, config, layout, torch.bfloat16):
        assert trace.state[0].data.dtype == torch.float32  # the masters
        differences = [abs(a - b) for a, b in zip(trace.losses, one.losses, strict=True)]
        # bf16 keeps 8 bits: 3e-3 at first; the trajectories then part slowly.
        assert 0 < max(differences[:5]) < 5e-3
        assert max(differences) < 0.06


def test_a_missing_all_reduce_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without the sum of the norms' gradients over tp it does."""
    monkeypatch.setattr(tensor.megatron, "copy_to_tp", lambda x, mesh: x)
    layout, ranks = LAYOUTS["tp2"]
    config = model_config()
    one = reference(config)
    assert all(max_difference(trace, one) > 1e-3 for trace in run_ranks(layout, ranks, train, config, layout))
