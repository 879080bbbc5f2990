"""A checkpoint loads into every layout: a run that changes its layout at every step ends where one process does."""

from functools import partial
from pathlib import Path

import pytest
import torch
from resharding import LAYOUTS

from triplane.model.config import ModelConfig
from triplane.prove.forked import run_ranks
from triplane.prove.networks import network
from triplane.prove.reference import largest_difference, proof_model, train_plainly
from triplane.prove.resharding import train_between

ORDER = [
    "zero3 tp2 dp2",
    "pp2 v2 dp2",
    "tp4",
    "zero3 dp2",
    "tp2 pp2",
    "cp2 zero2 dp2",
    "one",
    "tp2 sp dp2",
    "pp2",
    "zero2 dp2",
    "zero1",
    "tp2",
    "zero1 tp2 pp2",
    "dp2",
]
"""Neighbours differ in every axis; each layout saves for one and loads from another."""
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [(network(proof_model(), ("two tokens further",)), "averaged"), (proof_model(tie_embeddings=True), "normuon")],
    ids=["two tokens further", "tied"],
)
def test_a_run_through_all_layouts_is_the_run_of_one_process(
    config: ModelConfig, optimizer: str, tmp_path: Path
) -> None:
    one = train_plainly(config, len(ORDER), optimizer=optimizer)
    load = None
    for step, name in enumerate(ORDER):
        layout, ranks = LAYOUTS[name]
        steps = range(step, step + 1)
        train = partial(train_between, dtype=torch.float32, optimizer=optimizer, steps=steps, load=load, save=tmp_path)
        traces = run_ranks(layout, ranks, train, config, layout)
        for trace in traces:
            assert trace.losses == pytest.approx(one.losses[step : step + 1], abs=TOLERANCE), name
        load = tmp_path / f"step_{step + 1}"
    for trace in traces:
        whole = one.after(len(ORDER) - 1)
        assert largest_difference(trace, whole).largest < TOLERANCE


@pytest.mark.parametrize("name", ["zero1 dp2", "zero1 tp2 pp2", "dp2", "zero3 dp2", "pp2 v2 dp2"])
def test_resuming_in_the_same_layout_is_bitwise(name: str, tmp_path: Path) -> None:
    layout, ranks = LAYOUTS[name]
    config = proof_model()
    steps, cut = 8, 5
    train = partial(train_between, dtype=torch.float32)
    whole = run_ranks(layout, ranks, partial(train, steps=range(steps)), config, layout)
    run_ranks(layout, ranks, partial(train, steps=range(cut), save=tmp_path), config, layout)
    load = tmp_path / f"step_{cut}"
    resumed = run_ranks(layout, ranks, partial(train, steps=range(cut, steps), load=load), config, layout)
    for a, b in zip(whole, resumed, strict=True):
        assert a.losses[cut:] == b.losses
        for x, y in zip(a.state, b.state, strict=True):
            assert (x.key, x.offsets) == (y.key, y.offsets)
            assert x.data.equal(y.data), x.key
