"""Saves as a run sees them: what is kept, what is recorded, and a disk that is full."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from runs import small_run
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.checkpoint.folder import checkpoints
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.snapshot import Snapshot
from triplane.checkpoint.store import Save
from triplane.config.checks import check
from triplane.launcher.run import train_on
from triplane.parallel import zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.training.config import RunConfig
from triplane.training.report import Report

RANKS = 2


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def _train_until_the_disk_is_full(mesh: Mesh, config: RunConfig, ballast: Path) -> None:
    """From step 2 on not a byte is free, until a save has failed."""
    metrics, saved = Report.metrics, Report.saved

    def fill_disk(report: Report, step: int, values: Mapping[str, float]) -> None:
        metrics(report, step, values)
        if step == 2 and mesh.rank == 0:
            with open(ballast, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

    def make_room(report: Report, save: Save) -> None:
        saved(report, save)
        if save.error and mesh.rank == 0:
            ballast.unlink()

    Report.metrics, Report.saved = fill_disk, make_room  # type: ignore[assignment]
    train_on(mesh, config)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_and_every_kth_stay(prepared: Prepared, tmp_path: Path) -> None:
    rules = {"every_steps": 1, "keep_last": 1, "keep_every": 3, "keep_best": 1}
    training = {"eval_every_steps": 1, "stop_at_step": 4}
    optimizer = {"lr": 0.3}  # too high: the loss grows again
    run = tmp_path / "run"
    for stop in (4, 8):  # the second process knows the losses from the manifests
        tables = {"training": training | {"stop_at_step": stop}, "optimizer": optimizer, "checkpoint": rules}
        run_ranks(small_run(prepared, run, **tables).parallel, 1, _train, small_run(prepared, run, **tables))
    lines = _lines(run / "metrics.jsonl")
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(losses, key=losses.__getitem__)
    kept = checkpoints(run / "checkpoints")
    assert [path.name for path in kept] == [f"step_{step}" for step in sorted({best, 3, 6, 8})]
    assert Checkpoint(kept[0]).state["validation_loss"] == losses[int(kept[0].name[5:])]
    times = [line for line in lines if "checkpoint_time_s" in line]
    assert [line["step"] for line in times] == list(range(1, 9))
    assert all(0 < line["checkpoint_stall_time_s"] < line["checkpoint_time_s"] for line in times)


def _train_with_slow_copies(mesh: Mesh, config: RunConfig) -> None:
    take = Snapshot.take

    def take_slowly(*arguments: Any) -> Any:
        sleep(0.3)  # many steps
        return take(*arguments)

    Snapshot.take = take_slowly  # type: ignore[assignment]
    train_on(mesh, config)


def test_what_is_saved_is_the_state_of_its_step_though_training_goes_on(prepared: Prepared, tmp_path: Path) -> None:
    saved = {}
    for asynchronous, function in ((False, _train), (True, _train_with_slow_copies)):
        run = tmp_path / str(asynchronous)
        rules = {"every_steps": 3, "keep_last": 9, "asynchronous": asynchronous}
        config = small_run(prepared, run, parallel={"dp": RANKS}, checkpoint=rules)
        run_ranks(config.parallel, RANKS, function, config)
        saved[asynchronous] = [Checkpoint(path) for path in checkpoints(run / "checkpoints")]
    for expected, found in zip(saved[False], saved[True], strict=True):
        for key in expected.shapes:
            assert torch.equal(expected.tensor(key), found.tensor(key)), (found.folder, key)
    stalls = [line["checkpoint_stall_time_s"] for line in _lines(run / "metrics.jsonl") if "checkpoint_time_s" in line]
    assert stalls[0] > 0.1 > stalls[-1]  # the optimizer waited for the copy; after the last step there is none


def test_a_rule_that_cannot_hold_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path, checkpoint={"every_steps": 6, "keep_every": 9, "keep_best": 1})
    assert check(config, 1) == [
        "checkpoint.keep_every (9) is not a multiple of checkpoint.every_steps (6); the next multiple is 12",
        "keep_best: checkpoint.every_steps (6) is not a multiple of eval_every_steps (4); the next multiple is 8",
    ]


MODEL = {"dim": 8, "n_heads": 2, "head_dim": 4, "hidden_dim": 8, "tie_embeddings": True}
"""Two of its checkpoints, a record and TensorBoard fit on the small disk."""


def test_a_run_on_a_full_disk_trains_on_and_saves_when_there_is_room(
    prepared: Prepared, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    rules = {"every_steps": 3, "keep_last": 1}
    config = small_run(prepared, run, model=MODEL, parallel={"dp": RANKS}, checkpoint=rules)
    run_ranks(config.parallel, RANKS, _train_until_the_disk_is_full, config, small_disk / "ballast")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_8"]
    Checkpoint(run / "checkpoints" / "step_8").verify()
    shown = capfd.readouterr().out
    assert f"step 3: NOT SAVED: cannot write {run}/checkpoints/step_3: " in shown
    assert "bytes needed, 0 free; earlier checkpoints are untouched" in shown
    events = [(event["event"], event["step"]) for event in _lines(run / "history.jsonl")]
    assert ("save failed", 3) in events or "step 3: NOT RECORDED: [Errno 28] No space left" in shown
    assert f"step 6: saved {run}/checkpoints/step_6" in shown
    assert [line["step"] for line in _lines(run / "metrics.jsonl") if "loss" in line] == list(range(1, 9))


def test_a_run_that_could_not_save_its_last_state_fails(prepared: Prepared, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(200 * 1024))
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)
    config = small_run(prepared, run, model=MODEL, parallel={"dp": RANKS})
    with pytest.raises(RanksFailedError, match=r"the run's last state is not saved: cannot write .*/step_8"):
        run_ranks(config.parallel, RANKS, _train, config)
    events = [(event["event"], event["step"]) for event in _lines(run / "history.jsonl")]
    assert events == [("start", 0), *(("save failed", step) for step in (3, 6, 8))]
    assert [line["step"] for line in _lines(run / "metrics.jsonl") if "loss" in line] == list(range(1, 9))
