"""`triplane report`: gathers what runs have recorded into an HTML page."""

import os
from collections.abc import Sequence
from pathlib import Path

from triplane.launcher.monitor.recorded import Recorded
from triplane.launcher.monitor.report_html import page
from triplane.storage.errors import LaunchError, TriplaneError
from triplane.storage.files import write_whole
from triplane.training.run_folder import RunFolder

_COMPARISON = Path("comparison.html")


def report(run_dirs: Sequence[Path], out: Path | None) -> None:
    """Writes the report of a run, or one that compares several, and prints its path."""
    out = out or (RunFolder(run_dirs[0]).report if len(run_dirs) == 1 else _COMPARISON)
    try:
        write_report(run_dirs, out)
    except OSError as error:
        raise LaunchError(f"{out}: cannot be written: {error.strerror}; give another file by --out") from None
    print(out)


def report_problem(run_dir: Path) -> str | None:
    """Writes the report at the end of a run; returns an error instead of raising, so that the run does not fail."""
    try:
        write_report([run_dir], RunFolder(run_dir).report)
    except (OSError, TriplaneError) as error:
        return str(error)
    return None


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes the report to `out`; raises LaunchError if one of `run_dirs` is not a run folder, or is given twice."""
    real = [run_dir.resolve() for run_dir in run_dirs]
    for number, run_dir in enumerate(real):
        if run_dir in real[:number]:
            raise LaunchError(f"{run_dirs[number]}: given twice; leave one out")
    runs = [Recorded.read(run_dir, name) for run_dir, name in zip(run_dirs, _names(run_dirs, real))]
    write_whole(out, page(runs).encode(errors="backslashreplace"))


def _names(run_dirs: Sequence[Path], real: Sequence[Path]) -> list[str]:
    """Returns the path of a run alone; of several, what differs in their paths."""
    if len(run_dirs) == 1:
        return [str(run_dirs[0])]
    shared = Path(os.path.commonpath([run_dir.parent for run_dir in real]))
    return [str(run_dir.relative_to(shared)) for run_dir in real]
