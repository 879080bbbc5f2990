"""Local ranks: where they run, what they leave, which of several failed ones is named; they are small scripts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from triplane.launcher.local import LocalRanks


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def ranks(tmp_path: Path, script: str, count: int = 2) -> LocalRanks:
    ranks = LocalRanks(count, [], tmp_path)
    preamble = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from triplane.training.failure import Failure, record_failure\n"
        "rank = int(os.environ['RANK'])\n"
        "def fail(kind, message):\n"
        "    failure = Failure(rank, host='here', where='in step 7', kind=kind, message=message, time=time.time())\n"
        f"    record_failure(Path({str(tmp_path)!r}), failure)\n"
    )
    ranks.command = [sys.executable, "-c", preamble + script]
    return ranks


def test_the_first_to_fail_is_named_not_those_that_noticed(tmp_path: Path) -> None:
    started = ranks(
        tmp_path,
        f"while not rank and not Path({str(tmp_path)!r}, 'logs/rank_1.failure.json').exists(): time.sleep(0.01)\n"
        "fail('DataError', 'shard-3.tar is gone\\nand more') if rank else fail('RuntimeError', 'connection closed')\n"
        "sys.exit(2 if rank else 1)",
    )
    failure = started.run()
    assert "rank 1 on" in str(failure)
    assert str(failure).endswith("failed first, in step 7: DataError: shard-3.tar is gone")
    assert started.exit_code == 2


def test_a_killed_rank_is_named_before_those_that_noticed(tmp_path: Path) -> None:
    started = ranks(
        tmp_path,
        "os.kill(os.getpid(), signal.SIGKILL) if rank else None\n"
        "fail('RuntimeError', 'connection closed')\n"
        "sys.exit(1)",
    )
    failure = str(started.run())
    assert "rank 1 on" in failure and failure.endswith("failed first, in step 7: killed: by SIGKILL")
    assert started.exit_code == 128 + signal.SIGKILL


def test_a_rank_that_recorded_nothing_is_known_by_its_last_words(tmp_path: Path) -> None:
    started = ranks(tmp_path, "sys.exit('no such option')", count=1)
    assert str(started.run()).endswith("with exit code 1: last words: no such option")


def test_each_start_has_logs_and_each_rank_cores_of_its_own(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    started = ranks(
        tmp_path,
        f"while len(os.sched_getaffinity(0)) == {cores} > 1: time.sleep(0.01)  # bound by its launcher\n"
        "print(os.environ['OMP_NUM_THREADS'], *os.sched_getaffinity(0), file=sys.stderr)",
    )
    for start in (1, 2):
        assert started.run() is None
        assert started.log_file(1) == tmp_path / f"logs/rank_1.{start}.log"
    said = [(tmp_path / f"logs/rank_{rank}.{start}.log").read_text().split() for rank in (0, 1) for start in (1, 2)]
    assert said[0] == said[1] and said[2] == said[3]
    first, second = set(said[0][1:]), set(said[2][1:])
    if cores == 1:
        assert first == second  # not bound
    else:
        assert first and second and not first & second
    assert said[0][0] == os.environ["OMP_NUM_THREADS"]


def test_a_rank_that_is_ended_because_of_another_is_not_to_blame(tmp_path: Path) -> None:
    started = ranks(tmp_path, "time.sleep(0 if rank else 60)\nfail('DataError', 'gone')\nsys.exit(1)")
    assert str(started.run()).endswith("DataError: gone")
    assert started.exit_code == 1


@pytest.mark.parametrize(
    ("script", "code"), [("pass", 0), ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(9)", 143)]
)
def test_no_failure_is_reported_when_all_end_well_or_were_told_to(tmp_path: Path, script: str, code: int) -> None:
    started = ranks(tmp_path, script, count=1)
    assert started.run() is None
    assert started.exit_code == code


def test_ranks_are_told_to_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    rank = (
        "import pathlib, time\n"
        "from triplane.training.stopping import Stopping, request_name\n"
        "stopping = Stopping(pathlib.Path('.'), 0)\n"
        "pathlib.Path('ready').touch()\n"
        "while not (request := stopping.request()): time.sleep(0.01)\n"
        "pathlib.Path(request_name(request)).touch()"
    )
    launcher = (
        "import sys; from pathlib import Path; from triplane.launcher.local import LocalRanks\n"
        f"ranks = LocalRanks(1, [], Path('.')); ranks.command = [sys.executable, '-c', {rank!r}]; ranks.run()"
    )
    with subprocess.Popen([sys.executable, "-c", launcher], cwd=tmp_path) as process:
        wait_for(tmp_path / "ready")
        process.kill()
    wait_for(tmp_path / "launcher gone")


def wait_for(file: Path) -> None:
    for _ in range(6000):
        if file.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"no {file}")
