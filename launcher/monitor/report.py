"""`triplane report`: gathers what a run has recorded into an HTML page."""

from pathlib import Path

from triplane.launcher.monitor.report_html import page
from triplane.launcher.monitor.run_status import read_status
from triplane.storage.errors import LaunchError, TriplaneError
from triplane.storage.files import write_whole
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import EVENTS, METRICS_RECORDS, SAMPLES, read_log


def report(run_dir: Path, out: Path | None) -> None:
    """Writes the report of a run and prints its path."""
    out = out or RunFolder(run_dir).report
    try:
        write_report(run_dir, out)
    except OSError as error:
        raise LaunchError(f"{out}: cannot be written: {error.strerror}; give another file by --out") from None
    print(out)


def report_problem(run_dir: Path) -> str | None:
    """Writes the report at the end of a run; returns an error instead of raising, so that the run does not fail."""
    try:
        write_report(run_dir, RunFolder(run_dir).report)
    except (OSError, TriplaneError) as error:
        return str(error)
    return None


def write_report(run_dir: Path, out: Path) -> None:
    """Writes the report to `out`; raises LaunchError if `run_dir` is not a run folder."""
    status = read_status(run_dir)
    run = RunFolder(run_dir)
    lines = read_log(run.metrics, METRICS_RECORDS)
    events, samples = read_log(run.history, EVENTS), read_log(run.samples, SAMPLES)
    config = run.config.read_text() if run.config.exists() else ""
    html = page(status, metrics=lines, events=events, samples=samples, config=config)
    write_whole(out, html.encode(errors="backslashreplace"))
