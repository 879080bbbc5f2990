"""Requests to stop a run: signals, a file named `stop` in the run folder, and the death of the launcher."""

import os
import signal
from pathlib import Path
from types import FrameType

from triplane.training.run_folder import RunFolder

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FILE = 255
"""Represents the file in place of a signal's number."""
_ORPHANED = 254
LAUNCHER = "TRIPLANE_LAUNCHER_PID"
"""Environment variable with the launcher's process id; ranks stop once it has exited, as nothing would restart them."""


class Stopping:
    """Handles the signals of this process, in its main thread; rank 0 also looks for the file.

    A second SIGINT ends the process at once.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._file = RunFolder(run_dir).stop if rank == 0 else None
        self._launcher = os.environ.get(LAUNCHER)
        self._signal = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def request(self) -> int:
        """Returns the request to stop this rank: a signal's number or one of ours; 0 if there is none."""
        if self._signal:
            return self._signal
        if self._file is not None and self._file.exists():
            return _FILE
        return _ORPHANED if self._launcher not in (None, str(os.getppid())) else 0

    def clear(self) -> None:
        """Removes the file, after the state has been saved."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            os._exit(128 + number)
        self._signal = number


def request_name(request: int) -> str:
    """Returns a name such as `SIGTERM` or `stop file`."""
    return {_FILE: "stop file", _ORPHANED: "launcher gone"}.get(request) or signal.Signals(request).name
