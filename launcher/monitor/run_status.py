"""Reads the status of a run from the files in its folder."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, PositiveInt, ValidationError

from triplane.slurm.snapshot import last_submission
from triplane.storage.errors import LaunchError
from triplane.training.config import RunLength
from triplane.training.run_folder import CONFIG, SWEEP, RunFolder
from triplane.training.run_log import EVENTS, METRICS_RECORDS, Event, read_log

_TAIL_BYTES = 1 << 16
"""Bytes read from the end of metrics.jsonl: hundreds of steps."""


class _Source(BaseModel):
    corpus: str
    weight: float = 1.0


class _Phase(BaseModel):
    from_sequence: int
    weights: list[float] | None = None


class _Data(BaseModel):
    sources: list[_Source] = []
    phases: list[_Phase] = []


class _Training(RunLength, frozen=True):
    global_batch_size: PositiveInt = 1


class ShownConfig(BaseModel):
    """The keys of a run's config that are shown; configs of all versions have them."""

    training: _Training
    data: _Data = _Data()


@dataclass(frozen=True)
class RunStatus:
    """The status of one run."""

    run_dir: Path
    config: ShownConfig
    done: bool
    step: int
    """The last step that was logged."""
    metrics: dict[str, float]
    """The last value of each metric, by its name in `training.metrics.METRICS`."""
    updated_s: float | None
    """Time of the last metrics or event, seconds since 1970."""
    checkpoint_step: int | None
    """Step of the newest checkpoint."""
    checkpoint_s: float | None
    """Time at which it was complete, seconds since 1970."""
    ranks: int | None
    """Number of ranks since the last start."""
    restarts: int
    """Number of resumes from a checkpoint."""
    last_event: Event | None
    """The last line of history.jsonl."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.training.steps

    @property
    def steps_left(self) -> float:
        """Steps still to do, of the size of the last one."""
        training = self.config.training
        return training.sequences(training.steps, done=self.step) / training.batch_size(max(1, self.step))


def read_status(run_dir: Path) -> RunStatus:
    """Reads the status of a run; raises LaunchError if the folder has no config or a file cannot be read."""
    try:
        return _read_status(run_dir)
    except OSError as error:
        raise LaunchError(f"{error.filename or run_dir}: cannot be read: {error.strerror}") from None


def _read_status(run_dir: Path) -> RunStatus:
    lines = read_log(RunFolder(run_dir).metrics, METRICS_RECORDS, _TAIL_BYTES)
    events = read_log(RunFolder(run_dir).history, EVENTS)
    saves = [event for event in events if event["event"] == "save"]
    starts = [event for event in events if event["event"] in ("start", "resume")]
    metrics = {name: value for line in lines for name, value in line.items() if name not in ("step", "time")}
    return RunStatus(
        run_dir=run_dir,
        config=_config(run_dir),
        done=RunFolder(run_dir).steps_done() > 0,
        step=int(lines[-1]["step"]) if lines else 0,
        metrics=metrics,
        updated_s=max([line["time"] for line in lines[-1:]] + [event["time"] for event in events[-1:]], default=None),
        checkpoint_step=saves[-1]["step"] if saves else None,
        checkpoint_s=saves[-1]["time"] if saves else None,
        ranks=starts[-1]["details"].get("ranks") if starts else None,
        restarts=sum(event["event"] == "resume" for event in events),
        last_event=events[-1] if events else None,
    )


def _config(run_dir: Path) -> ShownConfig:
    """Reads the config of the last start, or of a job that has not started."""
    submission = last_submission(run_dir)
    for folder in filter(None, (run_dir, submission)):
        if (folder / CONFIG).exists():
            return _read_config(folder / CONFIG)
    if RunFolder(run_dir).is_running():
        raise LaunchError(f"{run_dir}: the run is starting: it has no {CONFIG} yet")
    raise LaunchError(f"{run_dir}: not a run folder: it has no {CONFIG}, or its start was refused")


def _read_config(path: Path) -> ShownConfig:
    try:
        return ShownConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key, problem = ".".join(map(str, first["loc"])), first["msg"]
        raise LaunchError(f"{path}: not the config of a run: {key}: {problem}; restore the file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise LaunchError(f"{path}: not the config of a run: {error}; restore the file") from None


def find_runs(folder: Path) -> list[Path]:
    """Returns the run folders at and below `folder`, each real folder once, including runs that have not started."""
    found: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        if (real := os.path.realpath(here)) in seen:  # reached before by another link
            continue
        seen.add(real)
        if RunFolder(here).exists():
            found.append(here)
            waiting += here.glob(f"{SWEEP}/")
        else:
            waiting += here.glob("*/")
    return sorted(found)
