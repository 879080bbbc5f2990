"""Runs on this machine as `triplane status`, `logs` and `cancel` see them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import held_by_another, small_run
from small_corpora import Prepared

from triplane.config.toml import to_toml
from triplane.launcher.monitor.jobs import cancel, logs, state_of, status
from triplane.launcher.monitor.run_status import read_status
from triplane.slurm.jobs import resume
from triplane.storage.errors import LaunchError
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import open_log, record_event


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Folder of a run of 40 steps that has resumed once and trained 12."""
    run_dir = tmp_path / "runs/small"
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text("[training]\nsteps = 40\n")
    now = time.time()
    lines: list[dict[str, Any]] = [
        {"step": step, "time": now, "loss": 5.0 - step / 10, "step_time_s": 0.1} for step in range(1, 13)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 13, "time"')  # being written
    events = [("start", 0), ("save", 5), ("resume", 5), ("save", 10)]
    lines = [{"time": now, "event": event, "step": step, "details": {"ranks": 2}} for event, step in events]
    (run_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "logs").mkdir()
    for start, text in ((1, "an older one\n"), (2, "a warning\n")):
        log = run_dir / f"logs/rank_1.{start}.log"
        log.write_text(text)
        os.utime(log, (start, start))
    return run_dir


def test_a_run_that_is_being_written_is_read(run_dir: Path) -> None:
    run = read_status(run_dir)
    assert (run.step, run.steps, run.checkpoint_step, run.restarts, run.done) == (12, 40, 10, 1, False)
    assert run.metrics["loss"] == pytest.approx(3.8)
    assert run.last_event and run.last_event["event"] == "save"


def test_a_long_run_is_read_from_its_end(run_dir: Path) -> None:
    lines = (json.dumps({"step": step, "time": 1.0, "loss": 1 / step}) + "\n" for step in range(1, 20_001))
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    assert read_status(run_dir).step == 20_000


def test_runs_below_a_folder_have_a_line_each(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    status(run_dir.parent)
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "state", "step", "loss"]
    assert line.split()[1:6] == ["died", "12/40", "3.8000", "10", "1"]
    (run_dir / "DONE").write_text("40\n")
    status(run_dir)
    assert "completed" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "state"), [(12, "stopped"), (40, "completed")])
def test_the_end_of_a_run_of_an_earlier_version_is_no_death(step: int, state: str, run_dir: Path) -> None:
    record_event(run_dir, "end", step)
    assert state_of(read_status(run_dir)) == state


def test_the_newest_log_is_shown(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    logs(run_dir, rank=1, follow=False)
    assert capsys.readouterr().out == f"==> {run_dir}/logs/rank_1.2.log\na warning\n"


def test_a_log_is_followed_through_a_restart(run_dir: Path, capfd: pytest.CaptureFixture) -> None:
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        logs(run_dir, rank=1, follow=True)
        os._exit(0)
    out = ""
    try:
        for log, text in (("rank_1.2.log", "more\n"), ("rank_1.3.log", "from the next start\n")):
            with (run_dir / "logs" / log).open("a") as lines:
                lines.write(text)
            while text not in out:
                out += capfd.readouterr().out
                time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGTERM)
        code = os.waitpid(child, 0)[1]
    assert code == 0
    assert out.splitlines()[1:] == [
        "a warning",
        "more",
        f"==> {run_dir}/logs/rank_1.3.log",
        "from the next start",
    ]


def test_what_is_not_there_is_said(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"rank_7\.\*\.log: no such log; found rank_1.1.log, rank_1.2.log"):
        logs(run_dir, rank=7, follow=False)
    with pytest.raises(LaunchError, match="no logs; give the folder"):
        logs(tmp_path, rank=0, follow=False)
    with pytest.raises(LaunchError, match="give --rank"):
        logs(run_dir, rank=None, follow=False)
    with pytest.raises(LaunchError, match="not a run folder, and contains none"):
        status(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match="never submitted"):
        resume(run_dir)


def test_a_run_that_died_is_told_at_once(run_dir: Path) -> None:
    with pytest.raises(LaunchError, match="it is not running: died"):
        cancel(run_dir)
    assert not (run_dir / "stop").exists()


def test_a_held_folder_is_a_run_that_is_running(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    for held in (run_dir, run_dir / "logs"):
        with held_by_another(held):
            status(run_dir)
            assert capsys.readouterr().out.splitlines()[1].split()[1] == "running"
    with held_by_another(run_dir), pytest.MonkeyPatch.context() as patch:
        patch.setattr("triplane.launcher.monitor.jobs._OBEY_S", 0.1)
        with pytest.raises(LaunchError, match="no process responded to"):
            cancel(run_dir)
    assert not (run_dir / "stop").exists()


@pytest.mark.parametrize("log", ["metrics.jsonl", "history.jsonl"])
@pytest.mark.parametrize("broken", [b'{"time": 1', b"\0\0\0", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"step": "x"}'])
def test_a_broken_line_of_a_log_spoils_no_other(run_dir: Path, log: str, broken: bytes) -> None:
    whole = read_status(run_dir)
    with (run_dir / log).open("rb+") as lines:
        content = b"".join(lines.read().splitlines(keepends=True)[:4])
        lines.seek(0)
        lines.truncate()
        lines.write(broken + b"\n" + content + broken)
    assert read_status(run_dir).checkpoint_step == whole.checkpoint_step
    record_event(run_dir, "rollback", 10)
    with open_log(RunFolder(run_dir).metrics) as lines:
        lines.write(json.dumps({"step": 14, "time": 1.0, "loss": 2.0}) + "\n")
    run = read_status(run_dir)
    assert (run.step, run.metrics["loss"]) == (14, 2.0)
    assert run.last_event and run.last_event["event"] == "rollback"


def test_what_cannot_be_read_is_told_beside_the_other_runs(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    configs = {"garbage": "\0", "other": "a = 1", "odd": "[training]\nsteps = 'x'", "refused": None}
    for name, text in configs.items():
        folder = run_dir.parent / name
        folder.mkdir()
        (folder / "history.jsonl").touch()
        if text is not None:
            (folder / "config.toml").write_text(text)
    (run_dir / "DONE").write_bytes(b"\xff")
    status(run_dir.parent)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [
        [str(run_dir.parent / name), "died" if name == run_dir.name else "unreadable"]
        for name in sorted([*configs, run_dir.name])
    ]
    assert [line.split(":")[0].removeprefix(f"{run_dir.parent}/") for line in lines[6:]] == [
        "garbage/config.toml",
        "odd/config.toml",
        "other/config.toml",
        "refused",
    ]


@pytest.mark.parametrize("name", ["DONE", "history.jsonl", "metrics.jsonl", "config.toml"])
def test_a_file_that_cannot_be_read_hides_its_own_run_only(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = run_dir.parent / "bad"
    shutil.copytree(run_dir, bad)
    (bad / name).unlink(missing_ok=True)
    (bad / name).mkdir()
    status(run_dir.parent)
    shown = capsys.readouterr().out
    assert f"{bad / name}: cannot be read: Is a directory" in shown and f"\n{run_dir} " in shown


def test_a_count_of_steps_that_is_none_is_passed_over(run_dir: Path) -> None:
    (run_dir / "DONE").write_text("9" * 5000)
    assert RunFolder(run_dir).steps_done() == 0


def test_a_loop_of_links_shows_each_run_once(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir.parent / "again").symlink_to("..")
    (run_dir.parent / "itself").symlink_to("itself")
    status(run_dir.parent)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_on_this_machine_saves_and_leaves(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run", training={"steps": 100_000}, parallel={"zero": 0})
    (tmp_path / "long.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "triplane", "train", "long.toml"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        try:
            while not (tmp_path / "run/history.jsonl").exists():
                assert process.poll() is None
                time.sleep(0.05)
            cancel(tmp_path / "run")
            assert process.wait(10) == 0
        finally:
            process.kill()
    last_event = read_status(tmp_path / "run").last_event
    assert last_event is not None and last_event["event"] == "stopped"
    with pytest.raises(LaunchError, match="it is not running: stopped"):
        cancel(tmp_path / "run")
