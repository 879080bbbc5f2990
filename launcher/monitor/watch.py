"""`triplane status --watch`: shows a live table of runs."""

import time
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from triplane.launcher.monitor.jobs import may_move, read_runs, state_of, unread_state
from triplane.launcher.monitor.run_status import RunStatus
from triplane.training.run_folder import RunFolder
from triplane.training.units import format_count, format_duration

_REFRESH_S = 2.0
"""Each refresh queries Slurm if the runs have jobs."""
_METRICS = (
    ("loss", "loss", "{:.4f}".format),
    ("tokens/s", "tokens_per_s", format_count),
    ("MFU", "mfu", "{:.1%}".format),
    ("validation loss", "validation_loss", "{:.4f}".format),
)
_COLUMNS = (
    *("run", "state", "step", "time left"),
    *(label for label, _, _ in _METRICS),
    *("checkpoint", "restarts", "ranks", "last update"),
)
_UNKNOWN = "-"
_PADDING = 3
"""Cells added to a column."""


def watch(folder: Path) -> None:
    """Shows the runs at or below `folder` until none is running or queued, or until Ctrl-C."""
    with Live(auto_refresh=False) as live:
        try:
            while True:
                runs, unreadable = read_runs(folder)
                table = _table(runs, unreadable, live.console.width)
                live.update(Group(table, *map(Text, unreadable.values())), refresh=True)
                if not any(map(may_move, runs)) and not any(RunFolder(run_dir).is_running() for run_dir in unreadable):
                    return
                time.sleep(_REFRESH_S)
        except KeyboardInterrupt:
            return


def _table(runs: Sequence[RunStatus], unreadable: Iterable[Path], width: int) -> Table:
    """Returns a table with a column per run or, if that is too wide, a row per run with as many facts as fit."""
    by_run = {run.run_dir: _facts(run, time.time()) for run in runs}
    for run_dir in unreadable:
        by_run[run_dir] = dict.fromkeys(_COLUMNS, _UNKNOWN) | {"run": str(run_dir), "state": unread_state(run_dir)}
    facts = [by_run[run_dir] for run_dir in sorted(by_run)]
    columns = [tuple(facts[0]), *(tuple(of_run.values()) for of_run in facts)]
    if sum(map(_width, columns)) >= width:
        rows = list(zip(*columns))
        columns = [row for row, end in zip(rows, accumulate(map(_width, rows))) if end < width] or rows[:2]
    table = Table(*(column[0] for column in columns))
    for row in list(zip(*columns))[1:]:
        table.add_row(*row)
    return table


def _width(texts: Sequence[str]) -> int:
    """Returns the width of a column."""
    return max(map(len, texts)) + _PADDING


def _facts(run: RunStatus, now_s: float) -> dict[str, str]:
    values, unknown = run.metrics, _UNKNOWN
    left_s = values["step_time_s"] * run.steps_left if "step_time_s" in values else None
    saved = unknown
    if run.checkpoint_step is not None and run.checkpoint_s is not None:
        saved = f"{run.checkpoint_step}, {_age(run.checkpoint_s, now_s)}"
    return {
        "run": str(run.run_dir),
        "state": state_of(run),
        "step": f"{run.step}/{run.steps}",
        "time left": unknown if left_s is None else format_duration(left_s),
        **{label: form(values[name]) if name in values else unknown for label, name, form in _METRICS},
        "checkpoint": saved,
        "restarts": str(run.restarts),
        "ranks": unknown if run.ranks is None else str(run.ranks),
        "last update": unknown if run.updated_s is None else _age(run.updated_s, now_s),
    }


def _age(then_s: float, now_s: float) -> str:
    return f"{format_duration(now_s - then_s)} ago"
