"""Where a run stands, from what it has written into its folder."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triplane.launcher.errors import LaunchError
from triplane.launcher.preflight import CONFIG, DONE
from triplane.launcher.slurm.snapshot import last_submission

_TAIL_BYTES = 1 << 16
"""Of metrics.jsonl: hundreds of steps."""


@dataclass(frozen=True)
class RunStatus:
    """Of one run."""

    run_dir: Path
    done: bool
    step: int
    """The last one that was logged."""
    steps: int
    """In the whole run."""
    metrics: dict[str, float]
    """The last value of each metric, by its name in `training.metrics.METRICS`."""
    updated_s: float | None
    """When the last metrics or event were written, seconds since 1970."""
    checkpoint_step: int | None
    """Of the newest checkpoint."""
    checkpoint_s: float | None
    """When it was whole, seconds since 1970."""
    ranks: int | None
    """Since the last start."""
    restarts: int
    """How often it has gone on from a checkpoint."""
    last_event: dict[str, Any] | None
    """The last line of history.jsonl."""


def read_status(run_dir: Path) -> RunStatus:
    """Raises LaunchError if the folder is not that of a run."""
    lines = list(_last_lines(run_dir / "metrics.jsonl"))
    events = list(json_lines(run_dir / "history.jsonl"))
    saves = [event for event in events if event["event"] == "save"]
    starts = [event for event in events if event["event"] in ("start", "resume")]
    metrics = {name: value for line in lines for name, value in line.items() if name not in ("step", "time")}
    return RunStatus(
        run_dir=run_dir,
        done=steps_done(run_dir) > 0,
        step=lines[-1]["step"] if lines else 0,
        steps=_steps(run_dir),
        metrics=metrics,
        updated_s=max((line["time"] for line in [*lines[-1:], *events[-1:]]), default=None),
        checkpoint_step=saves[-1]["step"] if saves else None,
        checkpoint_s=saves[-1]["time"] if saves else None,
        ranks=starts[-1]["details"]["ranks"] if starts else None,
        restarts=sum(event["event"] == "resume" for event in events),
        last_event=events[-1] if events else None,
    )


def _steps(run_dir: Path) -> int:
    """By the config of the last start, or of a job that has not begun."""
    submission = last_submission(run_dir)
    for folder in filter(None, (run_dir, submission)):
        if (folder / CONFIG).exists():
            steps: int = tomllib.loads((folder / CONFIG).read_text())["training"]["steps"]
            return steps
    raise LaunchError(f"{run_dir}: not the folder of a run: it has no {CONFIG}")


def steps_done(run_dir: Path) -> int:
    """The steps of a run that has taken its last one; 0 for others."""
    done = run_dir / DONE
    return int(done.read_text()) if done.exists() else 0


def find_runs(folder: Path) -> list[Path]:
    """The run folders at and below `folder`, those that were submitted but have not begun too."""
    marks = ("history.jsonl", "jobs/*/job_id")
    found = {folder for mark in marks for _ in folder.glob(mark)}
    return sorted(found or {path for below in folder.glob("*/") for path in find_runs(below)})


def _last_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        if file.tell():
            file.readline()  # the rest of a line that began before
        yield from _whole(file.read())


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a file that need not be there, without one that is being written."""
    if path.exists():
        yield from _whole(path.read_bytes())


def _whole(text: bytes) -> Iterator[dict[str, Any]]:
    """Without a last line that is being written."""
    return (json.loads(line) for line in text.split(b"\n")[:-1])
