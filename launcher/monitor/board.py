"""`triplane board`: TensorBoard on the runs in a folder."""

import os
import sys
from pathlib import Path

from triplane.launcher.monitor.jobs import runs_in


def board(folder: Path, host: str, port: int) -> None:
    """Becomes TensorBoard, which says where it is; raises LaunchError if there is no run in the folder."""
    runs_in(folder)
    options = ("--logdir", str(folder), "--host", host, "--port", str(port))
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *options])
