"""Checkpoints at a URL: an S3 on loopback takes what a run writes, and a run goes on from there."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_saves import LAYOUT, RANKS, kill_a_save, save
from runs import small_run
from save_phases import REMOTE_PHASES
from servers import s3_server
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork
from typer.testing import CliRunner

from triplane.checkpoint import store as store_module
from triplane.checkpoint.folder import checkpoints, set_aside, write_problem
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.resume import fill_from_newest
from triplane.checkpoint.store import Save
from triplane.config.preflight import find_checkpoint
from triplane.launcher.cli import app
from triplane.launcher.run import train_on
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.prove.forked import run_ranks
from triplane.prove.reference import proof_model
from triplane.prove.resharding import train_between
from triplane.storage import location as location_module
from triplane.storage.errors import CheckpointError, OutOfReachError
from triplane.storage.location import Location, entries, location, writing
from triplane.training.config import RunConfig


@pytest.fixture(scope="module")
def _server() -> Iterator[None]:
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        location("s3://bucket").fs.mkdir("bucket")
        yield


@pytest.fixture
def remote(_server: None, request: pytest.FixtureRequest) -> Location:
    """An empty folder in a bucket."""
    return location(f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}")


def test_what_is_written_at_a_url_is_what_is_written_to_a_disk(remote: Location, tmp_path: Path) -> None:
    for folder in (tmp_path, remote):
        run_ranks(LAYOUT, RANKS, _train_and_save, str(folder))
    local = entries(tmp_path / "step_2")
    assert entries(remote / "step_2") == local and len(local) == 3
    for name in local:
        assert (remote / "step_2" / name).read_bytes() == (tmp_path / "step_2" / name).read_bytes()
    there = Checkpoint(remote / "step_2")
    there.verify()


def test_a_file_is_read_in_several_requests(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing(remote / "file") as file:
        file.write(bytes(range(250)) * 20)
    monkeypatch.setattr(location_module, "_REQUEST_BYTES", 1000)
    target = bytearray(4200)
    parts = [len(part) for part in location_module.fill(remote / "file", 250, memoryview(target))]
    assert parts == [1000] * 4 + [200]
    assert target == (bytes(range(250)) * 20)[250:4450]


def _train_and_save(mesh: Mesh, folder: str) -> None:
    train_between(mesh, proof_model(), LAYOUT, dtype=torch.float32, steps=range(2), save=location(folder))


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def _end(prepared: Prepared, run: Path, folder: str | None, stops: list[int]) -> Checkpoint:
    """Where a run ends that stopped after these steps."""
    for stop in stops:
        config = small_run(prepared, run, checkpoint={"folder": folder}, training={"stop_at_step": stop})
        run_ranks(config.parallel, 1, _train, config)
    return Checkpoint(find_checkpoint(str(run)))


def test_a_run_resumes_from_a_url(prepared: Prepared, remote: Location, tmp_path: Path) -> None:
    whole = _end(prepared, tmp_path / "whole", None, [8])
    cut = _end(prepared, tmp_path / "cut", str(remote), [4, 8])
    assert not (tmp_path / "cut/checkpoints").exists()
    assert [path.name for path in checkpoints(remote)] == ["step_6", "step_8"]
    assert cut.folder == remote / "step_8"
    for key in whole.shapes:
        assert torch.equal(whole.tensor(key), cut.tensor(key)), key
    for place in (str(remote), str(remote / "step_8"), str(tmp_path / "cut")):
        shown = CliRunner().invoke(app, ["inspect", place, "--verify"])
        assert f"{remote}/step_8: step 8" in shown.output and "all checksums of tensors match" in shown.output
    exported = CliRunner().invoke(app, ["export", str(remote / "step_6"), str(tmp_path / "exported")])
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "exported/model.safetensors").exists()


def test_a_damaged_one_is_set_aside_and_passed_over(prepared: Prepared, remote: Location, tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole = _end(prepared, run, str(remote), [6, 8])
    weights = {key: whole.tensor(key) for key in whole.shapes}
    file = remote / "step_8" / "rank_0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(remote / "step_8").verify()
    again = _end(prepared, run, str(remote), [8])
    assert sorted(entries(remote)) == ["damaged_step_8", "step_6", "step_8"]
    assert (remote / "damaged_step_8" / "rank_0.safetensors").read_bytes() == content
    assert all(torch.equal(again.tensor(key), weight) for key, weight in weights.items())
    assert set_aside(remote / "step_8").name == "damaged_step_8.2"


def _resume_without_a_server(mesh: Mesh, folder: str) -> str:
    os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    assert "out of reach" in str(write_problem(location(folder)))
    try:
        fill_from_newest(location(folder), [])
    except OutOfReachError as error:
        return str(error)
    return "nothing was raised"


def test_what_is_out_of_reach_is_not_taken_for_damaged(remote: Location) -> None:
    run_ranks(LAYOUT, RANKS, save, str(remote), 1)
    for error in run_ranks(LAYOUT, RANKS, _resume_without_a_server, str(remote)):
        assert error.startswith(f"{remote}: out of reach: EndpointConnectionError: "), error
    assert write_problem(remote) is None
    assert [path.name for path in checkpoints(remote)] == ["step_1"] and sorted(entries(remote)) == ["step_1"]


@pytest.mark.usefixtures("_server")
def test_a_bucket_that_is_not_there_is_told_before_training() -> None:
    assert "no checkpoint can be written there: The specified bucket does not exist" in str(
        write_problem(location("s3://nowhere/run"))
    )


COMMITTED = ("after the manifest", "in the deletion of an old one")


@pytest.mark.parametrize("phase", REMOTE_PHASES)
def test_a_killed_save_leaves_the_one_before(phase: str, remote: Location) -> None:
    kill_a_save(remote, phase=phase, phases=REMOTE_PHASES, committed=phase in COMMITTED)


def test_a_store_that_fails_leaves_the_run_alive(remote: Location) -> None:
    run_ranks(LAYOUT, RANKS, save, str(remote), 1)
    for saved in run_ranks(LAYOUT, RANKS, _save_to_one_that_is_tired, str(remote), 2):
        assert saved.error.startswith(f"cannot write {remote}/step_2: {remote}/step_2: out of reach: it is tired")
        assert saved.error.endswith("earlier checkpoints are untouched; see that it can be written to")
    assert list(entries(remote)) == ["step_1"]


def _refuse(path: Location, fragments: Sequence[Fragment]) -> Any:
    raise OutOfReachError(f"{path.parent}: out of reach: it is tired")


def _save_to_one_that_is_tired(mesh: Mesh, folder: str, step: int) -> Save:
    if mesh.rank == 1:
        store_module.write_tensors = _refuse
    return save(mesh, folder, step)
