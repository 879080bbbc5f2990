"""The folder of a run: the name of everything in it."""

from dataclasses import dataclass
from pathlib import Path

from triplane.storage.locks import LOCK, is_held

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
_DIGITS = 18
"""The longest number of steps."""


@dataclass(frozen=True)
class RunFolder:
    """Where each part of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        """Every choice of the last start, as resolved."""
        return self.path / CONFIG

    @property
    def run_id(self) -> Path:
        """A name that no other run has, whatever its folder is called."""
        return self.path / "run_id"

    @property
    def done(self) -> Path:
        """Holds the number of steps once the run has taken its last one."""
        return self.path / "DONE"

    @property
    def stop(self) -> Path:
        """While this file exists, it asks the ranks to save and leave."""
        return self.path / "stop"

    @property
    def history(self) -> Path:
        """The events of the run, a JSON record a line."""
        return self.path / "history.jsonl"

    @property
    def metrics(self) -> Path:
        """The metrics of each logged step, a JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote during training, a JSON record a line."""
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
        """What each rank and start printed. Whoever starts ranks here locks this folder while they run."""
        return self.path / "logs"

    @property
    def job_log(self) -> Path:
        """The output of the Slurm job."""
        return self.logs / "job.log"

    @property
    def refused(self) -> Path:
        """Why rank 0 refused a start of ranks by others: the exit codes of a job's step are not reliable."""
        return self.logs / "refused"

    @property
    def first_cause(self) -> Path:
        """One line on the first cause of the last start's failure. The rank that creates it reports it."""
        return self.logs / "first_cause"

    @property
    def alive(self) -> Path:
        """Each living rank holds a lock on one byte of this file."""
        return self.logs / "alive"

    @property
    def jobs(self) -> Path:
        """A folder for each submission to Slurm, numbered from 1."""
        return self.path / "jobs"

    def failure(self, rank: int) -> Path:
        """What a rank that failed leaves for whoever started it."""
        return self.logs / f"rank_{rank}.failure.json"

    def trace(self, rank: int) -> Path:
        """The trace of the profiled steps."""
        return self.path / "profile" / f"rank_{rank}.json"

    def exists(self) -> bool:
        """Whether a run has started here, is starting, or was submitted."""
        marks = (self.history, self.config, self.alive, self.logs / LOCK)
        return any(mark.exists() for mark in marks) or any(self.jobs.glob("*/job_id"))

    def is_running(self) -> bool:
        """Whether a process on any machine trains in this folder or starts ranks for it."""
        return is_held(self.path) or is_held(self.logs)

    def steps_done(self) -> int:
        """The steps of a completed run; 0 if the run has not completed."""
        text = self.done.read_text(errors="replace").strip() if self.done.exists() else ""
        return int(text) if text.isdecimal() and len(text) <= _DIGITS else 0
