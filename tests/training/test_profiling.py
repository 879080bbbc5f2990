"""Traces of chosen steps on chosen ranks, of a real run."""

import json
from pathlib import Path

from runs import small_run
from small_corpora import Prepared

from triplane.config.checks import check
from triplane.launcher.run import train_on
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def steps_in(trace: Path) -> set[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    return {event["name"] for event in events if event["name"].startswith("step ")}


def test_the_window_is_traced_on_its_ranks(prepared: Prepared, tmp_path: Path) -> None:
    profile = {"start_step": 3, "steps": 2, "ranks": [1]}
    config = small_run(prepared, tmp_path, parallel={"dp": 2}, training={"steps": 6}, profile=profile)
    run_ranks(config.parallel, 2, _train, config)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_1.json"]
    assert steps_in(tmp_path / "profile/rank_1.json") == {"step 3", "step 4"}


def test_a_run_that_ends_within_the_window_writes_what_it_has(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path, training={"stop_at_step": 2}, profile={"start_step": 2, "steps": 5})
    run_ranks(config.parallel, 1, _train, config)
    assert steps_in(tmp_path / "profile/rank_0.json") == {"step 2"}


def test_ranks_that_are_not_there_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path, profile={"start_step": 2, "ranks": [0, 1]})
    assert check(config, 1) == ["profile.ranks has 1, but the last of 1 rank is 0"]
