"""A whole run, with validation and samples, under the axes that split tokens, stages and weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import small_run
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.launcher.run import train_on
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig

LAYOUTS: dict[str, dict[str, Any]] = {
    "tokens": {"dp": 1, "tp": 2, "sequence_parallel": True, "cp": 2, "cp_method": "ring", "recompute": "selective"},
    "stages": {"dp": 2, "pp": 2, "virtual_stages": 2, "zero": 2, "recompute": ["full", "selective"]},
    "weights": {"dp": 2, "zero": 3, "offload_optimizer": True},
}


def _run(prepared: Prepared, run_dir: Path, layout: dict[str, Any]) -> list[dict[str, float]]:
    """Runs a layout; returns the logged training and validation losses by step."""
    config = small_run(
        prepared,
        run_dir,
        model={"n_layers": 3, "n_kv_heads": 1},
        optimizer={"eps": 1e-3, "average_decay": 0.5},
        parallel=layout,
        training={"sample_every_steps": 8},
    )
    assert isinstance(config.parallel.dp, int)
    run_ranks(config.parallel, config.parallel.dp * config.parallel.ranks_of_one, _train, config)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    known = ("step", "loss", "validation_loss", "validation_average_loss")
    losses = [{key: entry[key] for key in known if key in entry} for entry in entries]
    return [entry for entry in losses if len(entry) > 1]  # a save is logged when it has ended


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


@pytest.fixture(scope="module")
def one(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return _run(prepared, tmp_path_factory.mktemp("one") / "run", {"dp": 1, "zero": 0})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_logs_what_one_process_logs(
    name: str, one: list[dict[str, float]], prepared: Prepared, tmp_path: Path
) -> None:
    logged = _run(prepared, tmp_path / "run", LAYOUTS[name])
    assert [entry.keys() for entry in logged] == [entry.keys() for entry in one]
    of_average = [entry for entry in one if "validation_average_loss" in entry]
    assert of_average and all(entry["validation_average_loss"] != entry["validation_loss"] for entry in of_average)
    for ours, theirs in zip(logged, one):
        assert ours == pytest.approx(theirs, abs=1e-5)
