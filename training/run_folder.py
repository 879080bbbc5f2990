"""Names the files and folders of a run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from triplane.storage.locks import LOCK, is_held

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
SWEEP = "sweep"
_DIGITS = 18
"""The longest number of steps."""


@dataclass(frozen=True)
class RunFolder:
    """Paths within the folder of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config of the last start."""
        return self.path / CONFIG

    @property
    def run_id(self) -> Path:
        """A unique name of the run, independent of its folder's name."""
        return self.path / "run_id"

    @property
    def done(self) -> Path:
        """Contains the number of steps once the run is complete."""
        return self.path / "DONE"

    @property
    def stop(self) -> Path:
        """While this file exists, it requests the ranks to save and exit."""
        return self.path / "stop"

    @property
    def history(self) -> Path:
        """The events of the run, one JSON record per line."""
        return self.path / "history.jsonl"

    @property
    def metrics(self) -> Path:
        """The metrics of each logged step, one JSON record per line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Text generated during training, one JSON record per line."""
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The page that `triplane report` writes."""
        return self.path / "report.html"

    @property
    def corpora(self) -> Path:
        """Corpora made from sources that are raw tars."""
        return self.path / "corpora"

    @property
    def packing(self) -> Path:
        """Plans of best-fit packing."""
        return self.path / "packing"

    @property
    def logs(self) -> Path:
        """The output of each rank and start. A process that starts ranks here locks this folder while they run."""
        return self.path / "logs"

    @property
    def job_log(self) -> Path:
        """The output of the Slurm job."""
        return self.logs / "job.log"

    @property
    def refused(self) -> Path:
        """Why rank 0 refused to start under srun or torchrun: the exit code of a job step is not reliable."""
        return self.logs / "refused"

    @property
    def first_cause(self) -> Path:
        """One line on the first cause of the last start's failure; the rank that creates the file reports it."""
        return self.logs / "first_cause"

    @property
    def alive(self) -> Path:
        """Each running rank holds a lock on one byte of this file."""
        return self.logs / "alive"

    @property
    def jobs(self) -> Path:
        """A folder for each submission to Slurm, numbered from 1."""
        return self.path / "jobs"

    @property
    def sweep(self) -> Path:
        """A run folder for each variant of a sweep."""
        return self.path / SWEEP

    def new_logs(self, ranks: Iterable[int]) -> dict[int, Path]:
        """Returns the logs of a new start of ranks on this machine, and makes their folder."""
        self.logs.mkdir(parents=True, exist_ok=True)
        starts = (path.suffixes[0].removeprefix(".") for path in self.logs.glob("rank_0.*.log"))
        start = 1 + max((int(name) for name in starts if name.isdecimal()), default=0)
        return {rank: self.logs / f"rank_{rank}.{start}.log" for rank in ranks}

    def failure(self, rank: int) -> Path:
        """The failure that a rank reports to the process that started it."""
        return self.logs / f"rank_{rank}.failure.json"

    def trace(self, rank: int) -> Path:
        """The trace of the profiled steps."""
        return self.path / "profile" / f"rank_{rank}.json"

    def problems(self) -> Iterator[str]:
        """Yields what stands in the place of a file or folder of the run."""
        files = (self.config, self.run_id, self.done, self.stop, self.history, self.metrics, self.samples, self.report)
        folders = (self.path / CHECKPOINTS, self.tensorboard, self.corpora, self.packing, self.logs, self.jobs)
        for kind, paths, is_one in (("file", files, Path.is_file), ("folder", folders, Path.is_dir)):
            for path in paths:
                if path.exists() and not is_one(path):
                    yield f"{path}: a run has a {kind} there, and this is none; move it away, or set another run_dir"

    def exists(self) -> bool:
        """Returns whether a run has started here, is starting, or was submitted."""
        marks = (self.history, self.config, self.alive, self.logs / LOCK)
        return any(mark.exists() for mark in marks) or any(self.jobs.glob("*/job_id"))

    def is_running(self) -> bool:
        """Returns whether a process on any machine trains in this folder or starts ranks for it."""
        return is_held(self.path) or is_held(self.logs)

    def steps_done(self) -> int:
        """Returns the steps of a complete run, else 0."""
        text = self.done.read_text(errors="replace").strip() if self.done.exists() else ""
        return int(text) if text.isdecimal() and len(text) <= _DIGITS else 0
