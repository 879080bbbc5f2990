"""`triplane board`: starts TensorBoard on the runs in a folder."""

from contextlib import suppress
from pathlib import Path

from triplane.launcher.monitor.jobs import runs_in
from triplane.storage.foreign import refuse_unprintable


def board(folder: Path, host: str, port: int) -> int:
    """Runs TensorBoard, which prints its address, until Ctrl-C; returns the exit code.

    Raises LaunchError if there is no run in the folder, and CheckpointError if TensorBoard cannot read a run's name.
    """
    for run_dir in runs_in(folder):
        refuse_unprintable(run_dir)
    with suppress(KeyboardInterrupt):
        from tensorboard import default, program  # takes a second, during which Ctrl-C may arrive

        server = program.TensorBoard(default.get_plugins())
        server.configure(("", "--logdir", str(folder), "--host", host, "--port", str(port)))
        return int(server.main())
    return 0
