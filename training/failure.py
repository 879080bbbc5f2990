"""What a rank that fails leaves in the run folder, so that the first cause can be told from what followed."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LOGS = "logs"
"""Folder in a run folder: what each rank and start printed. Its launcher holds it while ranks run."""


@dataclass(frozen=True)
class Failure:
    """Of one rank."""

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


def record_failure(run_dir: Path, rank: int, where: str, kind: str, message: str) -> None:
    """Replaces what the rank left earlier; whoever reads it sees all of it or nothing."""
    path = _path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    failure = Failure(rank, socket.gethostname(), where, kind, message, time.time())
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(failure)))
    os.replace(partial, path)


def take_failure(run_dir: Path, rank: int) -> Failure | None:
    """What the rank left, which is gone then."""
    path = _path(run_dir, rank)
    if not path.exists():
        return None
    failure = Failure(**json.loads(path.read_text()))
    path.unlink()
    return failure


def _path(run_dir: Path, rank: int) -> Path:
    return run_dir / LOGS / f"rank_{rank}.failure.json"
