"""A checkpoint loads into every layout: a run that changes its layout every few steps ends where one process does."""

from pathlib import Path

import pytest
import torch
from parity import LAYOUTS, STEPS, TOLERANCE, model_config, reference, state_difference, train
from ranks import run_ranks

ORDER = ["zero1 tp2 dp2", "pp2", "zero1 dp2", "tp2 pp2", "one", "zero1 pp2 dp2", "zero1", "tp2", "zero1 tp2 pp2", "dp2"]
"""Neighbours differ in every axis; each layout saves for one and loads from another."""


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_run_through_all_layouts_is_the_run_of_one_process(tied: bool, tmp_path: Path) -> None:
    config = model_config(tied)
    one = reference(config)
    each = STEPS // len(ORDER)
    load = None
    for number, name in enumerate(ORDER):
        layout, ranks = LAYOUTS[name]
        steps = range(number * each, (number + 1) * each)
        traces = run_ranks(layout, ranks, train, config, layout, *_rest(steps, load, tmp_path))
        for trace in traces:
            losses = one.losses[steps.start : steps.stop]
            assert trace.losses == pytest.approx(losses, abs=TOLERANCE), name
        load = tmp_path / f"step_{steps.stop}"
    assert all(state_difference(fragment, one) < TOLERANCE for trace in traces for fragment in trace.state)


@pytest.mark.parametrize("name", ["zero1 dp2", "zero1 tp2 pp2", "dp2"])
def test_resuming_in_the_same_layout_is_bitwise(name: str, tmp_path: Path) -> None:
    layout, ranks = LAYOUTS[name]
    config = model_config()
    whole = run_ranks(layout, ranks, train, config, layout)
    cut = 7
    run_ranks(layout, ranks, train, config, layout, *_rest(range(cut), None, tmp_path))
    rest = _rest(range(cut, STEPS), tmp_path / f"step_{cut}", tmp_path)
    resumed = run_ranks(layout, ranks, train, config, layout, *rest)
    for a, b in zip(whole, resumed, strict=True):
        assert a.losses[cut:] == b.losses
        for x, y in zip(a.state, b.state, strict=True):
            assert (x.key, x.offsets) == (y.key, y.offsets)
            assert x.data.equal(y.data), x.key


def _rest(steps: range, load: Path | None, save: Path) -> tuple:
    return torch.float32, steps, load, save
