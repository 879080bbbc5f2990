"""`triplane report`: what a run has written into its folder, gathered for a page of HTML."""

from pathlib import Path

from triplane.launcher.monitor.report_html import page
from triplane.launcher.monitor.run_status import read_status
from triplane.storage.errors import LaunchError, TriplaneError
from triplane.storage.files import write_whole
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import EVENTS, METRICS_RECORDS, SAMPLES, read_log


def report(run_dir: Path, out: Path | None) -> None:
    """Writes the report of a run and prints where it is."""
    out = out or RunFolder(run_dir).report
    try:
        write_report(run_dir, out)
    except OSError as error:
        raise LaunchError(f"{out}: cannot be written: {error.strerror}; give another file by --out") from None
    print(out)


def report_problem(run_dir: Path) -> str | None:
    """Writes the report into the run folder at the end of a run, which does not fail if that cannot be done."""
    try:
        write_report(run_dir, RunFolder(run_dir).report)
    except (OSError, TriplaneError) as error:
        return str(error)
    return None


def write_report(run_dir: Path, out: Path) -> None:
    """Raises LaunchError if `run_dir` is not the folder of a run."""
    status = read_status(run_dir)
    run = RunFolder(run_dir)
    lines = read_log(run.metrics, METRICS_RECORDS)
    events, samples = read_log(run.history, EVENTS), read_log(run.samples, SAMPLES)
    html = page(status, lines, events, samples, run.config.read_text() if run.config.exists() else "")
    write_whole(out, html.encode())
