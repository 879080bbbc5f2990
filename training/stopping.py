"""Requests to leave a run: signals, and a file named `stop` in the run folder."""

import os
import signal
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FILE = 255
"""Stands for the file where a signal's number would."""


class Stopping:
    """Listens to the signals of this process, from its main thread; rank 0 looks for the file too.

    A second SIGINT ends the process at once.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._file = run_dir / "stop" if rank == 0 else None
        self._signal = 0
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def request(self) -> int:
        """What asks this rank to leave: a signal's number or the file's; 0 if nothing does."""
        return self._signal or (_FILE if self._file is not None and self._file.exists() else 0)

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
    return "stop file" if request == _FILE else signal.Signals(request).name
