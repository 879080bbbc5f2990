"""`triplane board`: starts TensorBoard on the runs in a folder."""

import threading
import tomllib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triplane.config.preflight import flatten
from triplane.launcher.monitor.facts_table import differing
from triplane.launcher.monitor.jobs import runs_in
from triplane.launcher.monitor.run_status import find_runs
from triplane.storage.foreign import refuse_unprintable
from triplane.training.board import tag
from triplane.training.run_folder import RunFolder

_REFRESH_S = 5.0
_RESULTS = (("", "loss"), ("validation", "validation_loss"))
"""Sub-run and metric of what the table of hyperparameters shows of each run."""


def board(folder: Path, host: str, port: int) -> int:
    """Runs TensorBoard, which prints its address, until Ctrl-C; returns the exit code.

    Raises LaunchError if there is no run in the folder, and CheckpointError if TensorBoard cannot read a run's name.
    """
    runs = runs_in(folder)
    for run_dir in runs:
        refuse_unprintable(run_dir)
    with suppress(KeyboardInterrupt), TemporaryDirectory(prefix="triplane-board-") as shown:
        from tensorboard import default, program  # takes a second, during which Ctrl-C may arrive

        links = _Links(folder, Path(shown))
        links.refresh()
        _write_hyperparameters(links.names, Path(shown))
        threading.Thread(target=links.keep_fresh, daemon=True).start()
        server = program.TensorBoard(default.get_plugins())
        server.configure(("", "--logdir", shown, "--host", host, "--port", str(port)))
        return int(server.main())
    return 0


class _Links:
    """A folder of links to the events of runs, since TensorBoard calls a run by its path.

    A run is called by its folder or, where several have folders of one name, by its path; by a number too, where
    that is another's name.
    """

    def __init__(self, folder: Path, shown: Path):
        self._folder = folder
        self._shown = shown
        self.names: dict[Path, str] = {}

    def refresh(self) -> None:
        """Links what has been written since the last time, also by new runs."""
        found = find_runs(self._folder)
        folders = Counter(run_dir.resolve().name for run_dir in found)
        for run_dir in found:
            if run_dir not in self.names:
                name = run_dir.resolve().name
                whole = "-".join(run_dir.relative_to(self._folder).parts) or name
                alone = [name] if folders[name] == 1 else []
                others = {other for other, runs in folders.items() if runs == 1} - {name}
                taken = {*self.names.values(), *others}
                numbered = (f"{whole}-{number}" for number in count(2))
                self.names[run_dir] = next(free for free in chain(alone, [whole], numbered) if free not in taken)
            events = RunFolder(run_dir).tensorboard
            for path in events.rglob("events.out.*"):
                link = self._shown / self.names[run_dir] / path.relative_to(events)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(path.resolve())

    def keep_fresh(self) -> None:
        """Refreshes the links until the process ends."""
        pause = threading.Event()
        while not pause.wait(_REFRESH_S):
            with suppress(OSError):  # a run that is being deleted, or the end
                self.refresh()


def _write_hyperparameters(names: Mapping[Path, str], shown: Path) -> None:
    """Writes which hyperparameters TensorBoard shows: those in which the runs differ."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    configs = [config for run_dir in names if (config := _config(run_dir))]
    hyperparameters = [HParam(key) for key in differing(configs)]
    results = [Metric(tag(name), group=group, display_name=name.replace("_", " ")) for group, name in _RESULTS]
    writer = EventFileWriter(str(shown / next(iter(names.values()))))
    writer.add_event(Event(summary=hparams_config_pb(hyperparameters, results)))
    writer.close()


def _config(run_dir: Path) -> dict[str, Any]:
    """Returns the config by key; nothing if the run has none that is readable."""
    with suppress(OSError, ValueError):
        return flatten(tomllib.loads(RunFolder(run_dir).config.read_text()))
    return {}
