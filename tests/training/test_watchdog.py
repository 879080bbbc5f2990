"""A process that hangs ends itself and says where it stood; one that is slow for a reason goes on."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from triplane.training.exits import Exit
from triplane.training.failure import Where, failure_of, record_failure, take_failure
from triplane.training.stopwatch import Stopwatch
from triplane.training.watchdog import Watchdog


def in_child(run_dir: Path, body: Callable[[Watchdog, Stopwatch], None]) -> int:
    """The pid of a process that runs `body` under a watchdog that waits one second."""
    child = os.fork()
    if not child:
        stopwatch = Stopwatch(torch.device("cpu"))
        with Watchdog(1.0, rank=3, stopwatch=stopwatch, tell=partial(record_failure, run_dir)) as watchdog:
            body(watchdog, stopwatch)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps(watchdog: Watchdog, stopwatch: Stopwatch, *seconds: float) -> None:
    for step, wait_s in enumerate(seconds, start=1):
        with watchdog.work("step", step), stopwatch.phase("optimizer_time_s"):
            time.sleep(wait_s)


def test_a_hang_is_told_with_stacks(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    started_s = time.monotonic()
    assert exit_code(in_child(tmp_path, lambda *both: steps(*both, 0.01, 30))) == Exit.TRY_AGAIN
    assert time.monotonic() - started_s < 10
    failure = take_failure(tmp_path, 3)
    assert failure is not None and str(failure).endswith(
        "failed first, in step 2, optimizer: hang: no progress for 1 s"
    )
    assert "in steps\n" in capfd.readouterr().err
    assert take_failure(tmp_path, 3) is None


def test_a_hang_in_the_first_step_is_told(tmp_path: Path) -> None:
    assert exit_code(in_child(tmp_path, lambda *both: steps(*both, 30))) == Exit.TRY_AGAIN
    failure = take_failure(tmp_path, 3)
    assert failure is not None and failure.where == "in step 1, optimizer"


def test_a_start_may_take_longer_than_a_step(tmp_path: Path) -> None:
    def body(watchdog: Watchdog, stopwatch: Stopwatch) -> None:
        with watchdog.work("start", 0, at_least_s=60):
            time.sleep(2.5)
        time.sleep(2.5)  # between

    assert exit_code(in_child(tmp_path, body)) == 0


def test_a_start_that_hangs_is_told(tmp_path: Path) -> None:
    def body(watchdog: Watchdog, stopwatch: Stopwatch) -> None:
        with watchdog.work("start", 0, at_least_s=1):
            time.sleep(30)

    assert exit_code(in_child(tmp_path, body)) == Exit.TRY_AGAIN
    failure = take_failure(tmp_path, 3)
    assert failure is not None and failure.where == "before the first step, start"


@pytest.mark.parametrize(("compiled", "expected_s"), [(False, 60.0), (True, 600.0)])
def test_a_step_that_may_compile_again_has_more_time(compiled: bool, expected_s: float) -> None:
    watchdog = Watchdog(None, rank=0, stopwatch=Stopwatch(torch.device("cpu")), tell=lambda _: None, compiled=compiled)
    for _ in range(2):
        with watchdog.work("step", 1):
            limit_s = watchdog._limit_s
    assert limit_s == expected_s


def test_a_process_that_was_stopped_and_goes_on_has_not_hung(tmp_path: Path) -> None:
    child = in_child(tmp_path, lambda *both: steps(*both, 0.01, 0.4, 0.01))
    time.sleep(0.2)
    os.kill(child, signal.SIGSTOP)
    time.sleep(3)
    os.kill(child, signal.SIGCONT)
    assert exit_code(child) == 0


def test_an_error_is_noted_with_where_it_arose(tmp_path: Path) -> None:
    watchdog = Watchdog(None, rank=0, stopwatch=Stopwatch(torch.device("cpu")), tell=print)
    error = ZeroDivisionError("none")
    error.add_note("a library's own")
    with pytest.raises(ZeroDivisionError) as caught, watchdog.work("validation", 7):
        raise error
    assert caught.value.__notes__ == ["a library's own", Where("in step 7, validation")]
    assert failure_of(0, caught.value).where == "in step 7, validation"
