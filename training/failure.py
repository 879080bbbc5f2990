"""What a rank that fails leaves in the run folder, and how the first cause is told from what followed it."""

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
"""How long a rank that lost its peers waits for one of them to tell why."""
_POLL_S = 0.05


class Where(str):
    """A note on an exception that says where in the run it arose; other notes are of others."""


@dataclass(frozen=True)
class Failure:
    """That of one rank."""

    rank: int
    host: str
    where: str
    """`in step 12`."""
    kind: str
    """Name of the exception."""
    message: str
    time: float

    def __str__(self) -> str:
        first_line = self.message.partition("\n")[0]
        return f"rank {self.rank} on {self.host} failed first, {self.where}: {self.kind}: {first_line}"

    def record(self, run_dir: Path, step: int) -> None:
        """Adds it to the history as the first cause; `step` is that of the newest checkpoint."""
        cause = f"{self.kind}: {self.message}"
        record_event(run_dir, "failure", step, rank=self.rank, host=self.host, where=self.where, error=cause)


def failure_of(rank: int, error: BaseException) -> Failure:
    """The failure that `error` is, where `Watchdog.work` has noted that it arose."""
    notes = (note for note in getattr(error, "__notes__", []) if isinstance(note, Where))
    return Failure(
        rank, socket.gethostname(), next(notes, "outside of a step"), type(error).__name__, str(error), time.time()
    )


def lost_peers(error: BaseException) -> bool:
    """Whether the error only says that other ranks are gone."""
    from torch.distributed import DistError  # only where ranks have failed

    return isinstance(error, DistError | ConnectionError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection "))
    )


def record_failure(run_dir: Path, failure: Failure) -> None:
    """Replaces what the rank left earlier; whoever reads it sees all of it or nothing."""
    path = RunFolder(run_dir).failure(failure.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(asdict(failure)))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def take_failure(run_dir: Path, rank: int) -> Failure | None:
    """What the rank left, which is gone then."""
    path = RunFolder(run_dir).failure(rank)
    if not path.exists():
        return None
    text = path.read_bytes()
    path.unlink()
    try:
        return _FAILURES.validate_json(text)
    except ValidationError:
        return None  # cut off: the rank is judged by its end


def forget_failures(run_dir: Path, rank: int) -> None:
    """Removes what an earlier start left; other ranks of this one may have failed already."""
    RunFolder(run_dir).failure(rank).unlink(missing_ok=True)
    told = RunFolder(run_dir).first_cause
    if rank == 0 and told.exists() and told.stat().st_mtime < psutil.Process().create_time():
        told.unlink()


_FAILURES = TypeAdapter(Failure)


class Story:
    """How the failures of a start are told. Each rank that fails calls `tell`.

    `triplane train` knows how each rank that it started has ended, and tells the first cause itself: ranks only leave
    it theirs. Under torchrun and srun the first rank whose error is its own tells it. Those that only lost their peers
    leave it the time to, and then name one that has left no word, since it was killed.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, watched: bool, newest_step: Callable[[], int]):
        """`watched` by `triplane train`; `newest_step` is that of the newest checkpoint."""
        self.run_dir = run_dir
        self.rank = rank
        self.hosts: Sequence[str] = ["an unknown host"] * world_size
        """That of each rank, once the ranks have met."""
        self._watched = watched
        self._newest_step = newest_step
        self._run = RunFolder(run_dir)
        self._run.logs.mkdir(parents=True, exist_ok=True)
        # Each rank locks its byte of one file; the system unlocks it when the rank dies, however.
        self._roll = open(self._run.alive, "a+b")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.lockf(self._roll, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            self._lives_known = True
        except OSError:  # without locks, who lives is not known
            self._lives_known = False

    def tell(self, failure: Failure, aftermath: bool = False) -> None:
        """Records the failure of this rank, and the first cause if it is this rank's turn; `aftermath`: lost peers."""
        try:
            record_failure(self.run_dir, failure)
            if self._watched:
                return
            first = self._silent(failure) if aftermath else failure
            if first is not None and self._claim(first):
                if len(self.hosts) > 1:  # else the error itself follows
                    print(f"triplane: {first}", file=sys.stderr, flush=True)
                first.record(self.run_dir, self._newest_step())
        except (OSError, ValueError) as error:  # the failure itself is worth more than its record
            print(f"triplane: {failure}; NOT RECORDED: {error}", file=sys.stderr, flush=True)

    def _silent(self, failure: Failure) -> Failure | None:
        """The failure of a rank that cannot tell it; None if another rank has told the first cause meanwhile."""
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s:
            if self._run.first_cause.exists():
                return None
            time.sleep(_POLL_S)
        silent = [rank for rank in range(len(self.hosts)) if not self._run.failure(rank).exists()]
        if self._lives_known:
            silent = [rank for rank in silent if not locked_by_another(self._roll, rank, 1)]
        if not silent:
            return failure
        gone = silent[0]
        word = "it left no word: it was killed, or its machine is gone"
        return replace(failure, rank=gone, host=self.hosts[gone], kind="killed", message=word)

    def _claim(self, first: Failure) -> bool:
        """Makes the file with the first cause; False if another rank has."""
        try:
            with open(self._run.first_cause, "x") as file:
                file.write(f"{first}\n")
        except FileExistsError:
            return False
        return True
