"""The batch script after each way that its steps can end; `srun` and `scontrol` are stubs with a record."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.submitted import with_config
from small_corpora import Prepared

SAVE = """echo '{"event": "save"}' >> run/history.jsonl\n"""
WARN = "kill -USR1 $PPID; sleep 0.2\n"
ENDED = "kill -TERM $PPID; sleep 0.2\n"


@pytest.fixture(scope="module")
def shown(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that would be submitted."""
    folder = with_config(tmp_path_factory.mktemp("batch"), prepared)
    where = [sys.executable, "-m", "triplane", "submit", "long.toml", "--dry-run"]
    options = ["--nodes", "2", "--ranks-per-node", "2", "--allow-fresh-start", "faults.max_restarts=2"]
    shown = subprocess.run(
        [*where, *options], cwd=folder, env={**os.environ, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "no Slurm here" in shown.stderr
    (folder / "train.sbatch").write_text(shown.stdout)
    (folder / "bin").mkdir()
    command(folder, "scontrol", 'case $1 in show) echo "   Reason=$REASON" ;; *) echo "$@" >> requests ;; esac')
    command(folder, "sinfo", "printf 'n%d\\n' 1 2 3 4 5")
    return folder / "train.sbatch"


@pytest.fixture
def script(shown: Path) -> Iterator[Path]:
    """The script, with the folder of a run that has not started."""
    run = shown.parent / "run"
    (run / "jobs/1").mkdir(parents=True)
    (run / "logs").mkdir()
    yield shown
    shutil.rmtree(run)


def command(folder: Path, name: str, body: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run(script: Path, train: str, check: str = "", reason: str = "None", **more: str) -> tuple[int, str, list[str]]:
    """Runs a segment whose steps execute `train` and `check`; returns its exit code, output and requests."""
    folder = script.parent
    command(folder, "srun", f'case "$*" in *check-nodes*) :; {check}\n ;; *) :; {train}\n ;; esac')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "main", "REASON": reason}
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", **job, **more}
    done = subprocess.run(
        ["bash", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    requests = folder / "requests"
    lines = requests.read_text().splitlines() if requests.exists() else []
    requests.unlink(missing_ok=True)
    return done.returncode, done.stdout + done.stderr, lines


def test_it_is_good_bash(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    done = subprocess.run(["shellcheck", "--severity=warning", script], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_a_crash_is_requeued_until_there_were_too_many_without_a_checkpoint(script: Path) -> None:
    for crash in (1, 2):
        code, said, requests = run(script, "exit 1")
        assert (code, requests) == (0, ["requeue 7"])
        assert f"exit code 1; crash {crash} of 2" in said
    code, said, requests = run(script, SAVE + "exit 143")
    assert "crash 1 of 2" in said and requests == ["requeue 7"]
    run(script, "exit 1")
    code, said, requests = run(script, "exit 1")
    assert (code, requests) == (1, [])
    assert "crash 3 with no checkpoint in between; giving up" in said


@pytest.mark.parametrize(
    ("train", "reason", "code", "requests", "said"),
    [
        ("echo 1000000 > run/DONE; exit 1", "None", 0, [], "the run is done"),
        ("exit 2", "None", 2, [], "the run cannot continue without a change"),
        ("exit 0", "None", 0, [], "stopped as requested"),
        ("exit 75", "None", 0, ["requeue 7"], "exit code 75; crash 1 of 2"),
        (WARN + SAVE, "None", 0, ["requeue 7"], "saved"),
        (WARN + "exit 0", "None", 0, ["requeue 7"], "warned, but nothing was saved; crash 1 of 2"),
        (ENDED + "exit 143", "None", 1, [], "ended by Slurm"),
        (SAVE + ENDED + "exit 0", "None", 1, [], "ended by Slurm"),
        (WARN + SAVE + ENDED, "TimeLimit", 0, ["requeue 7"], "saved"),
        (WARN + ENDED + "exit 143", "TimeLimit", 0, ["requeue 7"], "nothing was saved; crash 1 of 2"),
    ],
)
def test_what_follows_a_step(script: Path, train: str, reason: str, code: int, requests: list[str], said: str) -> None:
    ended = run(script, train, reason=reason)
    assert ended[::2] == (code, requests)
    assert said in ended[1]


def test_a_run_that_was_done_with_fewer_steps_continues(script: Path) -> None:
    (script.parent / "run/DONE").write_text("999\n")
    assert run(script, "touch run/trained; exit 2")[0] == 2
    assert (script.parent / "run/trained").exists()


def test_a_warning_asks_the_ranks_and_an_old_one_is_forgotten(script: Path) -> None:
    stop = script.parent / "run/stop"
    run(script, WARN + "test -e run/stop && mv run/stop run/seen")
    assert (script.parent / "run/seen").exists()
    stop.touch()
    run(script, "test ! -e run/stop || touch run/old")
    assert not (script.parent / "run/old").exists()


def test_a_run_that_was_warned_before_it_trained_does_not_start(script: Path) -> None:
    _, said, requests = run(script, "touch run/trained", check=WARN)
    assert not (script.parent / "run/trained").exists()
    assert requests == ["requeue 7"], said


def test_a_job_goes_back_without_bad_nodes(script: Path) -> None:
    bad = "printf 'n3\\nn5\\n' >> run/jobs/1/bad_nodes; exit 3"
    code, said, requests = run(script, "touch run/trained", check=bad)
    assert (code, requests) == (0, ["requeue 7", "update JobId=7 ExcNodeList=n3,n5"])
    assert "failed the check: n3,n5" in said
    assert not (script.parent / "run/trained").exists()
    assert run(script, "echo 1000000 > run/DONE")[0] == 0  # the nodes stay excluded, the run continues


def test_a_job_that_too_few_nodes_are_left_for_ends(script: Path) -> None:
    bad = "printf 'n%d\\n' 1 3 4 5 >> run/jobs/1/bad_nodes; exit 3"
    code, said, requests = run(script, "touch run/trained", check=bad)
    assert (code, requests) == (1, [])
    assert "failed the check: n1,n3,n4,n5; without them partition main has 1 of the 2 nodes" in said
    assert run(script, "touch run/trained")[0] == 1  # the next job of a chain
    assert not (script.parent / "run/trained").exists()


def test_a_fresh_start_is_allowed_until_the_first_save(script: Path) -> None:
    allowed = 'echo "${*: -1}" >> run/last_words\n'
    run(script, allowed + "exit 1")
    run(script, allowed + SAVE + "exit 1")
    run(script, allowed)
    words = (script.parent / "run/last_words").read_text().split()
    config = str(script.parent / "run/jobs/1/config.toml")
    assert words == ["--allow-fresh-start", "--allow-fresh-start", config]


def test_each_segment_has_logs_of_its_own(script: Path) -> None:
    show = "printf '%s\\n' \"$@\" | grep ^--output= > run/output"
    for restart, more in (("0", {}), ("2", {"SLURM_RESTART_COUNT": "2"})):
        run(script, show, **more)
        path = (script.parent / "run/output").read_text().strip().removeprefix("--output=")
        assert path == str(script.parent / f"run/logs/rank_%t.job_7.{restart}.log")


def test_the_jobs_of_a_chain_leave_the_run_to_the_next(script: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    assert run(script, WARN + SAVE, **array)[::2] == (0, [])
    bad = run(script, "", check="echo n3 >> run/jobs/1/bad_nodes; exit 3", **array)
    assert bad[::2] == (0, ["update JobId=6 ExcNodeList=n3"])
    for _ in range(3):
        code, said, _ = run(script, "exit 1", **array)
    assert code == 1 and "giving up" in said
    assert run(script, "touch run/trained", **array)[0] == 1
    assert not (script.parent / "run/trained").exists()
