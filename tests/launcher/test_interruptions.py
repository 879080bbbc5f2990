"""Runs on two ranks that the command starts: signalled, killed and hung; real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import small_run
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.checkpoint.folder import latest
from triplane.checkpoint.reader import Checkpoint
from triplane.config.toml import to_toml
from triplane.launcher.run import train_on
from triplane.prove.forked import run_ranks

STEPS = 240
LAYOUT = {"dp": 2, "zero": 0}
TRAINING = {"steps": STEPS, "eval_every_steps": 1000, "log_every_steps": 1}


@pytest.fixture
def folder(prepared: Prepared, tmp_path: Path) -> Path:
    config = small_run(
        prepared,
        Path("run"),
        parallel=LAYOUT,
        training=TRAINING,
        checkpoint={"every_steps": 50, "keep_last": 9},
    )
    (tmp_path / "long.toml").write_text(to_toml(config))
    return tmp_path


@contextmanager
def started(
    folder: Path, *overrides: str, launch: tuple[str, ...] = (), **environment: str
) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, *launch, "-m", "triplane", "train", "long.toml", *overrides],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for rank in ranks_of(process):
            os.kill(rank, signal.SIGKILL)
        process.kill()
        process.communicate()


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The pids of its ranks, in order."""
    return children_of(process.pid)


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def step_of(folder: Path) -> int:
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/history.jsonl").read_text().splitlines()]


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=180)
    return process.returncode, errors


def interrupt_terminal(process: subprocess.Popen, folder: Path) -> None:
    os.killpg(process.pid, signal.SIGINT)


def terminate_as_slurm(process: subprocess.Popen, folder: Path) -> None:
    """Every process of the job, the data workers too."""
    ranks = ranks_of(process)
    workers = [worker for rank in ranks for worker in children_of(rank)]
    assert len(workers) >= len(ranks)
    for pid in (process.pid, *ranks, *workers):
        os.kill(pid, signal.SIGTERM)


def is_past(folder: Path, step: int) -> bool:
    return step_of(folder) > step


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_bytes(folder: Path, prepared: Prepared) -> None:
    for interrupt in (interrupt_terminal, terminate_as_slurm):
        begin = step_of(folder)
        with started(folder, "data.num_workers=1") as process:
            until(partial(is_past, folder, begin + 3), process)
            interrupt(process, folder)
            assert finish(process) == (0, "")
        save, told, end = history(folder)[-3:]
        assert (save["event"], told["event"], end["event"]) == ("save", "signal", "stopped")
        assert begin < save["step"] == told["step"] == end["step"] < STEPS
    with started(folder) as process:
        assert finish(process) == (0, "")
    assert [event["event"] for event in history(folder)].count("resume") == 2

    whole = small_run(prepared, folder / "whole", parallel=LAYOUT, training=TRAINING)
    run_ranks(whole.parallel, 2, train_on, whole)
    newest = [latest(folder / run / "checkpoints") for run in ("run", "whole")]
    ours, theirs = (Checkpoint(found) for found in newest if found is not None)
    assert ours.state["consumed_sequences"] == theirs.state["consumed_sequences"]
    for key in theirs.shapes:
        assert torch.equal(ours.tensor(key), theirs.tensor(key)), key
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, STEPS + 1)]


def test_a_second_interrupt_stops_at_once(folder: Path) -> None:
    with started(folder) as process:
        until(lambda: step_of(folder) > 3, process)
        ranks = ranks_of(process)
        os.kill(ranks[1], signal.SIGSTOP)  # nobody can save now
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        for pid in ranks:
            until_gone(pid)


def until_gone(pid: int) -> None:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} still runs")


def test_a_rank_that_dies_is_named_and_all_start_again_if_there_was_progress(folder: Path) -> None:
    with started(folder, "faults.max_restarts=1") as process:
        until(lambda: step_of(folder) > 55, process)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        until(lambda: len(history(folder)) > 4 and history(folder)[-1]["event"] == "resume", process)
        until(lambda: len(ranks_of(process)) == 2, process)
        os.kill(ranks_of(process)[0], signal.SIGKILL)
        code, errors = finish(process)
    assert code == 128 + signal.SIGKILL
    lines = errors.splitlines()
    assert "rank 1 on" in lines[0] and re.search(r"in step \d+, .*: killed: by SIGKILL", lines[0])
    assert lines[1].startswith("triplane: starting again from step 50; 0 restarts left")
    assert "rank 0 on" in lines[2] and len(lines) == 3
    events = [(event["event"], event["step"]) for event in history(folder)]
    assert events[:5] == [("start", 0), ("save", 50), ("failure", 50), ("restart", 50), ("resume", 50)]


TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "--max-restarts=1",
    "--shutdown-timeout=5",
)
STRIKES = {
    "killed": (signal.SIGKILL, "rank 1", "killed: it reported nothing"),
    "hung": (signal.SIGSTOP, "rank 0", "hang: no progress for"),
}


@pytest.mark.parametrize("kind", STRIKES)
def test_torchrun_starts_the_ranks_again_and_the_first_cause_is_told(kind: str, folder: Path) -> None:
    number, rank, cause = STRIKES[kind]
    overrides = ("faults.hang_timeout_s=4",)
    with started(folder, *overrides, launch=TORCHRUN, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as process:
        until(lambda: step_of(folder) > 55, process)
        os.kill(ranks_of(process)[1], number)
        code, errors = finish(process)
    assert code == 0, errors
    events = [event for event in history(folder) if event["event"] != "save"]
    assert [event["event"] for event in events] == ["start", "failure", "resume", "completed"]
    (told,) = (line for line in errors.splitlines() if "failed first" in line)
    assert told.startswith(f"triplane: {rank} on {socket.gethostname()} failed first, in step ") and cause in told
    details = events[1]["details"]
    assert f"rank {details['rank']}" == rank and details["host"] == socket.gethostname()
    assert details["where"].startswith("in step ") and cause in f"{details['error']}"
    assert events[1]["step"] == 50


def test_a_rank_that_hangs_is_found_and_all_start_again(folder: Path) -> None:
    with started(folder, "faults.hang_timeout_s=2") as process:
        until(lambda: step_of(folder) > 55, process)
        os.kill(ranks_of(process)[1], signal.SIGSTOP)
        code, errors = finish(process)
    assert code == 0
    first, second = errors.splitlines()
    assert "rank 0 on" in first and "in step" in first and "hang: no progress for" in first
    assert second.startswith("triplane: starting again from step 50")
    log = (folder / "run/logs/rank_0.1.log").read_text()
    assert "forward_backward in" in log or "all_reduce" in log
    assert history(folder)[-1]["event"] == "completed"
