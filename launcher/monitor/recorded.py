"""What a run has recorded, as the report shows it."""

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triplane.launcher.monitor.chart import Points
from triplane.launcher.monitor.jobs import state_of
from triplane.launcher.monitor.run_status import RunStatus, read_status
from triplane.training.metrics import METRICS
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import EVENTS, METRICS_RECORDS, SAMPLES, Details, Event, Metrics, Sample, read_log

FAULTS = ("failure", "rollback", "skip", "save failed", "checkpoint set aside")
STARTS = ("start", "resume")
STOPS = ("stopped", "completed", "end")
"""What was meant; `end` is of earlier versions."""


@dataclass(frozen=True)
class Recorded:
    """The records of one run."""

    name: str
    status: RunStatus
    state: str
    metrics: Sequence[Metrics]
    events: Sequence[Event]
    samples: Sequence[Sample]
    config: str
    """TOML."""

    @classmethod
    def read(cls, run_dir: Path, name: str) -> "Recorded":
        """Reads the records; raises LaunchError if `run_dir` is not a run folder."""
        run, status = RunFolder(run_dir), read_status(run_dir)
        return cls(
            name=name,
            status=status,
            state=_state(status),
            metrics=read_log(run.metrics, METRICS_RECORDS),
            events=read_log(run.history, EVENTS),
            samples=read_log(run.samples, SAMPLES),
            config=run.config.read_text() if run.config.exists() else "",
        )

    @property
    def start(self) -> Details:
        """The facts of the last start."""
        return next((event["details"] for event in reversed(self.events) if event["event"] in STARTS), Details())

    @property
    def unigram_loss(self) -> float | None:
        """Nats a token of a model that knows only token frequencies; None if the last start did not measure it."""
        return self.start.get("unigram_loss")

    @property
    def table(self) -> dict[str, Any]:
        """The config as nested tables."""
        return tomllib.loads(self.config)

    def points(self, name: str) -> Points:
        """Returns the finite values of a metric by step."""
        assert name.partition("/")[0] in METRICS, name
        return [(line["step"], line[name]) for line in self.metrics if name in line and math.isfinite(line[name])]

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric."""
        return self.status.metrics.get(name)

    def trained_s(self) -> float:
        """Returns the seconds of training, without steps rolled back and without pauses."""
        total = before = 0.0
        for line in self.metrics:
            if "step_time_s" in line:
                total += line["step_time_s"] * (line["step"] - before)
                before = line["step"]
        return total

    def lost_s(self) -> float:
        """Returns the seconds between a state that was saved and the return to it, because of a fault."""
        return sum(self._losses())

    def _losses(self) -> Iterator[float]:
        reached: dict[int, float] = {}
        stopped = True
        for event in self.events:
            if event["event"] == "rollback" or (event["event"] in STARTS and not stopped):
                yield event["time"] - reached.get(event["step"], event["time"])
            if event["event"] in (*STARTS, "save", "rollback"):
                reached[event["step"]] = event["time"]
            if event["event"] in (*STARTS, *STOPS):  # others may stand between a stop and the resume
                stopped = event["event"] in STOPS


def _state(status: RunStatus) -> str:
    """Returns the state; that of a run which writes its report as it stops is `stopped`, though it still runs."""
    stopped = status.last_event is not None and status.last_event["event"] == "stopped"
    return "stopped" if stopped and not status.done else state_of(status)
