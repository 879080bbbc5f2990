"""Records the failures of ranks in the run folder, and tells the first cause from its consequences."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

from triplane.storage.locks import locked_by_another
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import record_event

NOWHERE = "at an unknown step"
_GRACE_S = 3.0
"""How long a rank that lost its peers waits for one of them to report why."""
_POLL_S = 0.05


class Where(str):
    """A note on an exception that says where in the run it was raised; libraries add notes of other types."""


@dataclass(frozen=True)
class Failure:
    """The failure of one rank."""

    rank: int
    host: str
    where: str
    """For example `in step 12`."""
    kind: str
    """Name of the exception."""
    message: str
    time: float

    def __str__(self) -> str:
        first_line = self.message.partition("\n")[0]
        return f"rank {self.rank} on {self.host} failed first, {self.where}: {self.kind}: {first_line}"

    def record(self, run_dir: Path, step: int) -> None:
        """Adds this failure to the history as the first cause; `step` is the newest checkpoint's."""
        cause = f"{self.kind}: {self.message}"
        record_event(run_dir, "failure", step, rank=self.rank, host=self.host, where=self.where, error=cause)


def failure_of(rank: int, error: BaseException) -> Failure:
    """Describes `error`, with the place that `Watchdog.work` noted."""
    notes = (note for note in getattr(error, "__notes__", []) if isinstance(note, Where))
    return Failure(
        rank=rank,
        host=socket.gethostname(),
        where=next(notes, "outside of a step"),
        kind=type(error).__name__,
        message=str(error),
        time=time.time(),
    )


def lost_peers(error: BaseException) -> bool:
    """Returns whether the error only says that other ranks are lost."""
    from torch.distributed import DistError  # needed only after a failure

    return isinstance(error, DistError | ConnectionError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection "))
    )


def record_failure(run_dir: Path, failure: Failure) -> None:
    """Writes the rank's failure atomically, in place of an earlier one."""
    path = RunFolder(run_dir).failure(failure.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(asdict(failure)))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def take_failure(run_dir: Path, rank: int) -> Failure | None:
    """Returns the failure that the rank recorded, and removes it."""
    path = RunFolder(run_dir).failure(rank)
    if not path.exists():
        return None
    text = path.read_bytes()
    path.unlink()
    try:
        return _FAILURES.validate_json(text)
    except ValidationError:
        return None  # truncated: the exit code has to do


def forget_failures(run_dir: Path, rank: int) -> None:
    """Removes what an earlier start recorded, but not what other ranks of this start may have recorded already."""
    RunFolder(run_dir).failure(rank).unlink(missing_ok=True)
    first_cause = RunFolder(run_dir).first_cause
    if rank == 0 and first_cause.exists() and first_cause.stat().st_mtime < psutil.Process().create_time():
        first_cause.unlink()


_FAILURES = TypeAdapter(Failure)


class Story:
    """Reports the first cause of a failed start. Each rank that fails calls `tell`.

    `triplane train` sees how each of its ranks ended, and reports the first cause itself: ranks only record their
    failures. Under torchrun and srun the first rank with an error of its own reports it. Ranks that only lost their
    peers give it time to, and then blame one that recorded nothing because it was killed.
    """

    def __init__(self, run_dir: Path, *, rank: int, world_size: int, watched: bool, newest_step: Callable[[], int]):
        """`watched`: `triplane train` started this rank. `newest_step` returns the newest checkpoint's step."""
        self.run_dir = run_dir
        self.rank = rank
        self.hosts: Sequence[str] = ["an unknown host"] * world_size
        """The host of each rank, known once the ranks have connected."""
        self._watched = watched
        self._newest_step = newest_step
        self._run = RunFolder(run_dir)
        self._run.logs.mkdir(parents=True, exist_ok=True)
        # Each rank locks one byte of a file; the kernel releases the lock however the rank dies.
        self._roll = open(self._run.alive, "a+b")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.lockf(self._roll, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            self._has_locks = True
        except OSError:  # without locks, a killed rank looks like a running one
            self._has_locks = False

    def tell(self, failure: Failure, aftermath: bool = False) -> None:
        """Records this rank's failure, and the first cause if no other rank has; `aftermath`: it only lost peers."""
        try:
            record_failure(self.run_dir, failure)
            if self._watched:
                return
            first = self._silent(failure) if aftermath else failure
            if first is not None and self._claim(first):
                if len(self.hosts) > 1:  # a single rank prints the error itself
                    print(f"triplane: {first}", file=sys.stderr, flush=True)
                first.record(self.run_dir, self._newest_step())
        except (OSError, ValueError) as error:  # must not hide the failure itself
            print(f"triplane: {failure}; NOT RECORDED: {error}", file=sys.stderr, flush=True)

    def _silent(self, failure: Failure) -> Failure | None:
        """Returns the failure of a rank that was killed; None if another rank reports the first cause meanwhile."""
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s:
            if self._run.first_cause.exists():
                return None
            time.sleep(_POLL_S)
        silent = [rank for rank in range(len(self.hosts)) if not self._run.failure(rank).exists()]
        if self._has_locks:
            silent = [rank for rank in silent if not locked_by_another(self._roll, rank, 1)]
        if not silent:
            return failure
        lost = silent[0]
        message = "it reported nothing: it was killed, or its machine is lost"
        return replace(failure, rank=lost, host=self.hosts[lost], kind="killed", message=message)

    def _claim(self, first: Failure) -> bool:
        """Creates the file with the first cause; returns False if another rank has."""
        try:
            with open(self._run.first_cause, "x") as file:
                file.write(f"{first}\n")
        except FileExistsError:
            return False
        return True
