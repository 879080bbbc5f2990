"""A run whose newest checkpoints are damaged goes on from the newest whole one, and never silently from none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import small_run
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.checkpoint.manifest import MANIFEST
from triplane.checkpoint.reader import Checkpoint
from triplane.config.preflight import check_run_dir, run_record
from triplane.data.opening import open_sources
from triplane.launcher.run import train_on
from triplane.parallel import zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.training.config import RunConfig


def _train(mesh: Mesh, config: RunConfig, allow_fresh_start: bool) -> None:
    train_on(mesh, config, allow_fresh_start=allow_fresh_start)


def _start(config: RunConfig, allow_fresh_start: bool = False) -> None:
    run_ranks(config.parallel, 2, _train, config, allow_fresh_start)


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def _set_aside(run_dir: Path) -> list[dict]:
    """Returns the events of the history about checkpoints set aside."""
    events = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "checkpoint set aside"]


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The end of the run that nothing happened to."""
    config = small_run(prepared, tmp_path_factory.mktemp("whole") / "run", parallel={"dp": 2})
    _start(config)
    return Checkpoint(Path(config.run_dir) / "checkpoints" / "step_8")


def _assert_same_end(run_dir: Path, whole: Checkpoint) -> None:
    end = Checkpoint(run_dir / "checkpoints" / "step_8")
    assert end.state["consumed_sequences"] == whole.state["consumed_sequences"]
    for key in whole.shapes:
        assert end.tensor(key).equal(whole.tensor(key)), key


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit that only one rank reads": (lambda step: _flip(step / "rank_1.safetensors", -1), "CRC-32"),
    "manifest": (lambda step: _flip(step / MANIFEST, 500), "damaged"),
    "half-written": (lambda step: (step / MANIFEST).unlink(), "not a finished checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(name: str, whole: Checkpoint, prepared: Prepared, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    run = tmp_path / "run"
    _start(small_run(prepared, run, parallel={"dp": 2}, training={"stop_at_step": 6}))
    assert _names(run) == ["step_3", "step_6"]
    damage(run / "checkpoints" / "step_6")
    config = small_run(prepared, run, parallel={"dp": 2})
    record = run_record(config, open_sources(config.data, config.folder.corpora))
    assert check_run_dir(config, record, allow_data_change=False, allow_fresh_start=False) == []
    _start(config)
    _assert_same_end(run, whole)
    assert _names(run) == ["damaged_step_6", "step_6", "step_8"]
    (event,) = _set_aside(run)
    assert event["step"] == 6
    assert reason in event["details"]["reason"]
    assert event["details"]["path"] == str(run / "checkpoints" / "damaged_step_6")


def test_without_a_whole_checkpoint_a_run_begins_anew_only_if_told(
    whole: Checkpoint, prepared: Prepared, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _start(small_run(prepared, run, parallel={"dp": 2}, training={"stop_at_step": 6}))
    for step in ("step_3", "step_6"):
        _flip(run / "checkpoints" / step / "rank_0.safetensors", -1)  # of rank 0's moments
    config = small_run(prepared, run, parallel={"dp": 2})
    with pytest.raises(RanksFailedError, match=r"no checkpoint is whole; .* --allow-fresh-start"):
        _start(config)
    assert _names(run) == ["damaged_step_3", "damaged_step_6"]
    record = run_record(config, open_sources(config.data, config.folder.corpora))
    (problem,) = check_run_dir(config, record, allow_data_change=False, allow_fresh_start=False)
    assert "damaged_step_3, damaged_step_6" in problem
    assert check_run_dir(config, record, allow_data_change=False, allow_fresh_start=True) == []
    (run / "checkpoints" / "damaged_step_3").rename(run / "checkpoints" / "step_3")
    _start(config, allow_fresh_start=True)  # what was read of the moments is forgotten
    _assert_same_end(run, whole)
    assert [event["step"] for event in _set_aside(run)] == [6, 3, 3]
