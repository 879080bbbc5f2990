"""`triplane report`: what a run has written into its folder, gathered for a page of HTML."""

from pathlib import Path

from triplane.data.errors import DataError
from triplane.data.files import write_whole
from triplane.launcher.errors import LaunchError
from triplane.launcher.monitor.report_html import page
from triplane.launcher.monitor.run_status import read_status
from triplane.launcher.preflight import CONFIG
from triplane.training.run_log import EVENTS, HISTORY, METRICS_LOG, METRICS_RECORDS, SAMPLES, SAMPLES_LOG, read_log

REPORT = "report.html"
"""In the run folder."""


def report(run_dir: Path, out: Path | None) -> None:
    """Writes the report of a run and prints where it is."""
    out = out or run_dir / REPORT
    try:
        write_report(run_dir, out)
    except OSError as error:
        raise LaunchError(f"{out}: cannot be written: {error.strerror}; give another file by --out") from None
    print(out)


def report_problem(run_dir: Path) -> str | None:
    """Writes the report into the run folder at the end of a run, which does not fail if that cannot be done."""
    try:
        write_report(run_dir, run_dir / REPORT)
    except (OSError, DataError, LaunchError) as error:
        return str(error)
    return None


def write_report(run_dir: Path, out: Path) -> None:
    """Raises LaunchError if `run_dir` is not the folder of a run."""
    status = read_status(run_dir)
    lines = read_log(run_dir / METRICS_LOG, METRICS_RECORDS)
    events, samples = read_log(run_dir / HISTORY, EVENTS), read_log(run_dir / SAMPLES_LOG, SAMPLES)
    config = run_dir / CONFIG
    html = page(status, lines, events, samples, config.read_text() if config.exists() else "")
    write_whole(out, html.encode())
