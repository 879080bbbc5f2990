"""Starts the ranks of a run on this machine, passes signals on to them, and starts them again after a crash."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from triplane.checkpoint.folder import latest, step_of
from triplane.checkpoint.location import Location
from triplane.training.failure import Failure, log_file, take_failure
from triplane.training.history import record_event

_USER_ERROR = 2
_GRACE_S = 5.0
"""After the first failure: ranks that notice it by themselves say what befell them before they are killed."""
_POLL_S = 0.05
_NOWHERE = "at an unknown step"


def run_local_ranks(
    count: int, arguments: Sequence[str], run_dir: Path, checkpoints: Location, max_restarts: int
) -> int:
    """Runs `triplane` with `arguments` on `count` ranks of this machine; returns the exit code.

    After a crash they are started again if there is a checkpoint that was not there before. Rank 0 prints here;
    warnings and tracebacks go into the log of each rank.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    ranks = LocalRanks(count, arguments, run_dir)
    for restarts_left in range(max_restarts, -1, -1):
        before = latest(checkpoints)
        failure = ranks.run()
        if failure is None:
            return ranks.exit_code
        if ranks.exit_code == _USER_ERROR:
            print("\n".join(f"triplane: {line}" for line in failure.message.splitlines()), file=sys.stderr)
        else:
            print(f"triplane: {failure}; see {log_file(run_dir, failure.rank)}", file=sys.stderr)
        newest = latest(checkpoints)
        step = step_of(newest) if newest else 0
        cause = f"{failure.kind}: {failure.message}"
        record_event(run_dir, "failure", step, rank=failure.rank, host=failure.host, where=failure.where, error=cause)
        if ranks.stopped_by or ranks.exit_code == _USER_ERROR or newest == before or not restarts_left:
            break
        print(f"triplane: starting again from step {step}; {restarts_left - 1} restarts left", file=sys.stderr)
        record_event(run_dir, "restart", step, restarts_left=restarts_left - 1)
    return ranks.exit_code


class LocalRanks:
    """The processes of one start after another.

    SIGTERM and SIGUSR1 reach the ranks, which save and leave; SIGINT does as SIGTERM, since a rank that has it from
    elsewhere too would take it for the second. A second SIGINT kills them.
    """

    def __init__(self, count: int, arguments: Sequence[str], run_dir: Path):
        self.count = count
        self.command = [sys.executable, "-m", "triplane", *arguments]
        self.run_dir = run_dir
        self.stopped_by = 0
        """The last signal to this process."""
        self.exit_code = 0
        """Of the last start."""
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)

    def run(self) -> Failure | None:
        """Starts them and waits until all have ended; returns the first failure, if there is one."""
        port = _free_port()
        self._processes = []
        for rank in range(self.count):
            take_failure(self.run_dir, rank)
            self._processes.append(self._start(rank, port))
        killed = self._wait()
        codes = {rank: process.returncode for rank, process in enumerate(self._processes)}
        failures = [self._failure(rank, code) for rank, code in codes.items() if code and rank not in killed]
        if self.stopped_by and -_passed_on(self.stopped_by) in codes.values():
            self.exit_code = 128 + self.stopped_by  # before a rank was ready to save anything
            return None
        if not failures:
            self.exit_code = 0
            return None
        first = min(failures, key=lambda failure: failure.time)
        code = codes[first.rank]
        self.exit_code = code if code > 0 else 128 - code
        if first.where == _NOWHERE:  # what was killed cannot say where it stood; those that waited for it can
            first = replace(first, where=next((peer.where for peer in failures if peer.where != _NOWHERE), _NOWHERE))
        return first

    def _start(self, rank: int, port: int) -> "subprocess.Popen[bytes]":
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.count,
            "LOCAL_WORLD_SIZE": self.count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        log = log_file(self.run_dir, rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            return subprocess.Popen(
                self.command,
                env={**os.environ, **{name: str(value) for name, value in place.items()}},
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C reaches them through this process only
                preexec_fn=_terminate_when_orphaned,
            )

    def _wait(self) -> set[int]:
        """Until all have ended; returns the ranks that had to be killed."""
        deadline = float("inf")
        killed: set[int] = set()
        while running := [rank for rank, process in enumerate(self._processes) if process.poll() is None]:
            if deadline == float("inf") and any(process.returncode for process in self._processes):
                deadline = time.monotonic() + _GRACE_S
            if time.monotonic() > deadline:
                killed.update(running)
                self._kill()
            time.sleep(_POLL_S)
        self._kill()
        return killed

    def _kill(self) -> None:
        """With the data workers of ranks that are gone already."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == self.stopped_by == signal.SIGINT:
            self._kill()
            os._exit(128 + number)
        self.stopped_by = number
        for process in self._processes:
            process.send_signal(_passed_on(number))

    def _failure(self, rank: int, code: int) -> Failure:
        failure = take_failure(self.run_dir, rank)
        if failure is not None:
            return failure
        if code > 0:
            lines = log_file(self.run_dir, rank).read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no word in its log")
            return Failure(rank, socket.gethostname(), f"with exit code {code}", "last words", last, time.time())
        name = signal.Signals(-code).name
        # NCCL aborts a rank when another is gone.
        when = float("inf") if -code == signal.SIGABRT else 0.0
        return Failure(rank, socket.gethostname(), _NOWHERE, "killed", f"by {name}", when)


def _passed_on(number: int) -> int:
    return signal.SIGTERM if number == signal.SIGINT else number


def _terminate_when_orphaned() -> None:
    """In a rank: if this process is killed, the rank saves and leaves."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
