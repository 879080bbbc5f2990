"""Starts the ranks of a run on this machine, forwards signals to them, and restarts them after a crash."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext

from triplane.checkpoint.folder import newest_step
from triplane.launcher.cores import cores_of_ranks
from triplane.launcher.monitor.report import report_problem
from triplane.storage.errors import CheckpointError
from triplane.storage.location import Location
from triplane.training.exits import Exit
from triplane.training.failure import NOWHERE, Failure, take_failure
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import record_event
from triplane.training.stopping import LAUNCHER

_GRACE_S = 5
"""Time after the first failure for ranks that notice it to report their own, before they are killed."""
_POLL_S = 0.05


def run_local_ranks(
    count: int, arguments: Sequence[str], run_dir: Path, *, checkpoints: Location, max_restarts: int
) -> int:
    """Runs `triplane` with `arguments` on `count` ranks of this machine; returns the exit code.

    Restarts them after a crash if there is a new checkpoint. Rank 0 prints here; warnings and tracebacks go into a log
    per rank and start.
    """
    ranks = LocalRanks(count, arguments, run_dir)
    for restarts_left in range(max_restarts, -1, -1):
        before = newest_step(checkpoints)
        failure = ranks.run()
        if failure is None:
            return ranks.exit_code
        if ranks.exit_code == Exit.MISTAKE:
            print("\n".join(f"triplane: {line}" for line in failure.message.splitlines()), file=sys.stderr)
        else:
            print(f"triplane: {failure}; see {ranks.log_file(failure.rank)}", file=sys.stderr)
        step = _record(failure, run_dir, checkpoints, before=before)
        if ranks.stopped_by or ranks.exit_code == Exit.MISTAKE or step == before or not restarts_left:
            break
        print(f"triplane: starting again from step {step}; {restarts_left - 1} restarts left", file=sys.stderr)
        with _errors_printed():
            record_event(run_dir, "restart", step, restarts_left=restarts_left - 1)
    if problem := report_problem(run_dir):
        print(f"triplane: no report: {problem}", file=sys.stderr)
    return ranks.exit_code


def _record(failure: Failure, run_dir: Path, checkpoints: Location, *, before: int) -> int:
    """Adds the failure to the history; returns the step of the newest checkpoint, or `before` if it is unreachable."""
    step = before
    with _errors_printed():
        step = newest_step(checkpoints)
    with _errors_printed():
        failure.record(run_dir, step)
    return step


@contextmanager
def _errors_printed() -> Iterator[None]:
    """Prints instead of raising: a full disk or a store that is down must not hide the crash."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        print(f"triplane: NOT RECORDED: {error}", file=sys.stderr)


class LocalRanks:
    """The processes of the ranks, start after start.

    Forwards SIGTERM and SIGUSR1 to the ranks, which save and exit, and SIGINT as SIGTERM, since a rank that also
    receives it from elsewhere would count two. A second SIGINT kills them.
    """

    def __init__(self, count: int, arguments: Sequence[str], run_dir: Path):
        self.count = count
        self.command = [sys.executable, "-m", "triplane", *arguments]
        self.run_dir = run_dir
        self.stopped_by = 0
        """The last signal that this process received."""
        self.exit_code = 0
        """Exit code of the last start."""
        self._processes: _Processes | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        # torch elastic's handlers raise an exception wherever this process is, so it gets a signal we do not use.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        # This module reports failed ranks itself, with the first cause.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    def run(self) -> Failure | None:
        """Starts the ranks and waits until all have exited; returns the first failure, if any."""
        for rank in range(self.count):
            take_failure(self.run_dir, rank)
        self._processes = processes = _Processes(self.command, self.count, self.run_dir)
        processes.start()
        if self.stopped_by:  # during the start
            processes.send_signal(_passed_on(self.stopped_by))
        result = processes.wait(period=_POLL_S)
        assert result is not None  # there is no time limit
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        found = [self._failure(rank, code) for rank, code in codes.items()]
        failures = [failure for failure in found if failure is not None]
        if self.stopped_by and -_passed_on(self.stopped_by) in codes.values():
            self.exit_code = 128 + self.stopped_by  # the signal came before the ranks handled it
            return None
        if not failures:
            self.exit_code = 0
            return None
        first = min(failures, key=lambda failure: failure.time)
        code = codes[first.rank]
        self.exit_code = code if code > 0 else 128 - code
        if first.where == NOWHERE:  # a killed rank cannot report where it was, but ranks that waited for it can
            first = replace(first, where=next((peer.where for peer in failures if peer.where != NOWHERE), NOWHERE))
        return first

    def log_file(self, rank: int) -> Path:
        """Returns the log of a rank in the last start."""
        assert self._processes is not None
        return Path(self._processes.stderrs[rank])

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == self.stopped_by == signal.SIGINT:
            if self._processes is not None:
                self._processes.kill()
            os._exit(128 + number)
        self.stopped_by = number
        if self._processes is not None:
            self._processes.send_signal(_passed_on(number))

    def _failure(self, rank: int, code: int) -> Failure | None:
        """Returns the failure of a rank that exited with `code`; None if it was killed because others had failed."""
        assert self._processes is not None
        if rank in self._processes.killed:
            return None
        if failure := take_failure(self.run_dir, rank):
            return failure
        if code > 0:
            lines = self.log_file(rank).read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "its log is empty")
            return Failure(
                rank=rank,
                host=socket.gethostname(),
                where=f"with exit code {code}",
                kind="last words",
                message=last,
                time=time.time(),
            )
        name = signal.Signals(-code).name
        # NCCL aborts a rank once another is lost.
        when = float("inf") if -code == signal.SIGABRT else 0.0
        return Failure(
            rank=rank, host=socket.gethostname(), where=NOWHERE, kind="killed", message=f"by {name}", time=when
        )


class _Processes(SubprocessContext):
    """The processes of one start, each in its own session, so that Ctrl-C reaches them only through the launcher."""

    def __init__(self, command: Sequence[str], count: int, run_dir: Path):
        port = _free_port()
        self._cores = cores_of_ranks(count)
        environment = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, len(self._cores[0]))),
            LAUNCHER: os.getpid(),
        }
        super().__init__(
            "rank",
            command[0],
            {rank: tuple(command[1:]) for rank in range(count)},
            {
                rank: {name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()}
                for rank in range(count)
            },
            _Logs(run_dir),
        )
        self.killed: set[int] = set()
        """Ranks that did not exit by themselves after another failed."""

    def start(self) -> None:
        """Starts the ranks; without GPUs, binds each rank and its threads to its own cores, if there are enough."""
        super().start()
        if torch.cuda.is_available() or not all(self._cores):
            return
        for rank, pid in self.pids().items():
            with suppress(ProcessLookupError):  # it has failed already
                os.sched_setaffinity(pid, self._cores[rank])

    def send_signal(self, number: int) -> None:
        for handler in self.subprocess_handlers.values():
            handler.proc.send_signal(number)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = _GRACE_S) -> None:
        """Waits for the ranks, then kills those left; called once a rank has failed, or all have exited."""
        deadline_s = time.monotonic() + timeout
        while (running := self._running()) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        self.killed = running
        super().close(signal.SIGKILL, timeout)
        self.kill()

    def _running(self) -> set[int]:
        return {rank for rank, handler in self.subprocess_handlers.items() if handler.proc.poll() is None}

    def kill(self) -> None:
        """Kills all ranks, and the data workers of ranks that have already exited."""
        for pid in self.pids().values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


class _Logs(LogsSpecs):
    """Sends rank 0's output to the console, and the stderr of each rank to `logs/rank_N.START.log`."""

    def __init__(self, run_dir: Path):
        super().__init__(str(RunFolder(run_dir).logs))
        self.run_dir = run_dir

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        logs = RunFolder(self.run_dir).new_logs(envs)
        return LogsDest(
            stdouts=dict.fromkeys(envs, ""),
            stderrs={rank: str(path) for rank, path in logs.items()},
            error_files=dict.fromkeys(envs, os.devnull),
        )


def _passed_on(number: int) -> int:
    return signal.SIGTERM if number == signal.SIGINT else number


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
