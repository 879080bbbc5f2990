"""Requests to leave a run: signals, a file named `stop` in the run folder, and the end of who started the ranks."""

import os
import signal
from pathlib import Path
from types import FrameType

from triplane.training.run_folder import RunFolder

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FILE = 255
"""Stands for the file where a signal's number would."""
_ORPHANED = 254
LAUNCHER = "TRIPLANE_LAUNCHER_PID"
"""Environment variable of ranks that are to leave when this process is gone: nobody would start them again."""


class Stopping:
    """Listens to the signals of this process, from its main thread; rank 0 looks for the file too.

    A second SIGINT ends the process at once.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._file = RunFolder(run_dir).stop if rank == 0 else None
        self._launcher = os.environ.get(LAUNCHER)
        self._signal = 0
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def request(self) -> int:
        """What asks this rank to leave: a signal's number or another; 0 if nothing does."""
        if self._signal:
            return self._signal
        if self._file is not None and self._file.exists():
            return _FILE
        return _ORPHANED if self._launcher not in (None, str(os.getppid())) else 0

    def obeyed(self) -> None:
        """Removes the file: the state is saved."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            os._exit(128 + number)
        self._signal = number


def request_name(request: int) -> str:
    """`SIGTERM`, or `stop file`."""
    return {_FILE: "stop file", _ORPHANED: "launcher gone"}.get(request) or signal.Signals(request).name
