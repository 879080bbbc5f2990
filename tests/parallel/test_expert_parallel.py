"""Experts over ranks: checkpoints of any layout, and what is refused. `triplane prove` compares their training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from triplane.checkpoint.folder import checkpoint_of
from triplane.model.parts.shared import SharedExperts
from triplane.parallel import experts, megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.rules import layout_problems
from triplane.prove.forked import run_ranks
from triplane.prove.networks import network
from triplane.prove.reference import (
    Difference,
    largest_difference,
    proof_batch,
    proof_engine,
    proof_model,
    train_plainly,
)
from triplane.prove.resharding import train_between

MODEL = network(proof_model(), ("experts in groups",))
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"dp": 1},
    "ep 2": {"dp": 2, "ep": 2},
    "ep 2, zero 3": {"dp": 4, "ep": 2, "zero": 3},
    "tp 2": {"dp": 1, "tp": 2},
    "ep 4 and tp 2": {"dp": 4, "ep": 4, "tp": 2, "zero": 0},
}
CLOSE = Difference(loss=1e-5, norm=2e-5, weight=1e-5, moment=1e-5)


def _save(mesh: Mesh, layout: ParallelConfig, folder: Path) -> None:
    train_between(mesh, MODEL, layout, dtype=torch.float32, steps=range(2), save=folder)


def _resume(mesh: Mesh, layout: ParallelConfig, folder: Path) -> Difference:
    rest = train_plainly(MODEL, 4).after(2)
    path = checkpoint_of(folder, 2)
    return largest_difference(
        train_between(mesh, MODEL, layout, dtype=torch.float32, steps=range(2, 4), load=path), rest
    )


def _ranks(layout: ParallelConfig) -> int:
    assert isinstance(layout.dp, int)
    return layout.dp * layout.ranks_of_one


@pytest.mark.parametrize(
    ("saved", "loaded"), [("ep 2", "one rank"), ("tp 2", "ep 2, zero 3"), ("ep 2, zero 3", "ep 4 and tp 2")]
)
def test_a_run_goes_on_over_other_ranks(saved: str, loaded: str, tmp_path: Path) -> None:
    before, after = (ParallelConfig(**LAYOUTS[name]) for name in (saved, loaded))
    run_ranks(before, _ranks(before), _save, before, tmp_path)
    for difference in run_ranks(after, _ranks(after), _resume, after, tmp_path):
        assert difference.within(CLOSE), difference


def _order(mesh: Mesh, layout: ParallelConfig, order: list[str]) -> list[str]:
    model = network(proof_model(), ("experts, one shared",))
    proof_engine(mesh, model, layout, dtype=torch.float32).evaluate([proof_batch(model, 0, [mesh.dp.rank])])
    return order


def test_shared_experts_compute_while_rows_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    forward, permuted = SharedExperts.forward, experts.permuted
    monkeypatch.setattr(SharedExperts, "forward", lambda *args: order.append("shared") or forward(*args))
    monkeypatch.setattr(experts, "permuted", lambda *args: order.append("permuted") or permuted(*args))
    layout = ParallelConfig(dp=2, ep=2)
    for found in run_ranks(layout, 2, _order, layout, order):
        assert found == ["shared", "permuted", "permuted"] * 5, "each layer: shared experts, rows arrive, outputs leave"


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ({"dp": 3, "ep": 3}, "n_experts (8) is not a multiple of ep (3); the next multiple is 9"),
        ({"dp": 2, "ep": 4}, "ep (4) does not divide dp (2) x cp (1)"),
    ],
)
def test_what_does_not_fit_is_refused(layout: dict[str, Any], problem: str) -> None:
    assert list(layout_problems(MODEL, ParallelConfig(**layout), "fp32")) == [problem]


def test_a_model_without_experts_has_none_to_split() -> None:
    layout = ParallelConfig(dp=2, ep=2)
    expected = "ep (2) splits experts, and the model has none; set parallel.ep=1"
    assert list(layout_problems(proof_model(), layout, "fp32")) == [expected]
