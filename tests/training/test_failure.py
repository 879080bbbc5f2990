"""The first cause of a start that failed is told once, by whoever knows it; the ranks are processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from triplane.training.failure import Story, Where, failure_of, forget_failures, lost_peers, take_failure
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import EVENTS, Event, read_log

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29500")


def fails(run_dir: Path, error: Exception, after_s: float = 0.0, watched: bool = False) -> Callable[[int], None]:
    """Returns a function in which a rank ends with `error`."""

    def rank_ends(rank: int) -> None:
        time.sleep(after_s)
        error.add_note(Where(f"in step {rank + 1}"))
        story = Story(run_dir, rank=rank, world_size=4, watched=watched, newest_step=lambda: 40)
        story.hosts = ["a", "b", "c", "d"][: len(story.hosts)]
        story.tell(failure_of(rank, error), aftermath=lost_peers(error))

    return rank_ends


def start(*ranks: Callable[[int], None]) -> None:
    children = []
    for rank, rank_ends in enumerate(ranks):
        child = os.fork()
        if not child:
            rank_ends(rank)
            os._exit(0)
        children.append(child)
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)


def told(run_dir: Path) -> Event:
    (event,) = read_log(RunFolder(run_dir).history, EVENTS)
    assert event["event"] == "failure" and event["step"] == 40
    return event


def test_an_error_of_its_own_comes_before_lost_peers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(fails(tmp_path, LOST), fails(tmp_path, ValueError("shard-3.tar is gone\nmore"), 0.5), fails(tmp_path, LOST))
    details = told(tmp_path)["details"]
    assert (details["rank"], details["where"]) == (1, "in step 2")  # type: ignore[typeddict-item]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("triplane: rank 1 on ") and line.endswith("in step 2: ValueError: shard-3.tar is gone")
    assert (tmp_path / "logs/first_cause").read_text() == line.removeprefix("triplane: ") + "\n"


def test_a_rank_that_leaves_no_word_was_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def waits_for_its_peers(rank: int) -> None:
        story = Story(tmp_path, rank=rank, world_size=4, watched=False, newest_step=lambda: 40)
        time.sleep(5)
        del story

    start(waits_for_its_peers, fails(tmp_path, DistNetworkError("reset")), lambda rank: None, fails(tmp_path, LOST))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("triplane: rank 2 on c failed first, in step ") and "killed: it reported nothing" in line
    assert told(tmp_path)["details"]["host"] == "c"  # type: ignore[typeddict-item]


def test_of_two_errors_at_once_one_is_told(tmp_path: Path) -> None:
    start(*[fails(tmp_path, ValueError("bad")) for _ in range(3)])
    told(tmp_path)


def test_a_start_that_is_watched_leaves_the_word_to_its_launcher(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start(fails(tmp_path, ValueError("bad"), watched=True))
    assert not RunFolder(tmp_path).history.exists() and not capfd.readouterr().err
    assert (tmp_path / "logs/rank_0.failure.json").exists()


def test_a_new_start_tells_its_own_cause(tmp_path: Path) -> None:
    for cause in ("first", "second"):
        for rank in range(3):
            forget_failures(tmp_path, rank)
        start(fails(tmp_path, ValueError(cause)), lambda rank: None, lambda rank: None)
        os.utime(tmp_path / "logs/first_cause", (0, 0))  # before the next start
    errors = [event["details"]["error"] for event in read_log(RunFolder(tmp_path).history, EVENTS)]  # type: ignore[typeddict-item]
    assert errors == ["ValueError: first", "ValueError: second"]


def test_a_failure_that_cannot_be_recorded_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    story = Story(tmp_path, rank=0, world_size=2, watched=False, newest_step=lambda: 40)
    (tmp_path / "logs/rank_0.failure.partial").symlink_to("/dev/full")
    story.tell(failure_of(0, ValueError("bad")))
    (line,) = capfd.readouterr().err.splitlines()
    assert "ValueError: bad; NOT RECORDED: [Errno 28]" in line
    assert not list((tmp_path / "logs").glob("*.partial"))


def test_a_failure_that_was_cut_off_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_0.failure.json").write_text('{"rank": 0')
    assert take_failure(tmp_path, 0) is None and take_failure(tmp_path, 0) is None
