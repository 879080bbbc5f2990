"""`triplane status`, `logs`, `cancel` and `resume`: the runs in a folder, and their jobs if they have any."""

import time
from contextlib import suppress
from pathlib import Path

from triplane.launcher.config import load_config
from triplane.launcher.errors import LaunchError
from triplane.launcher.monitor.run_status import RunStatus, find_runs, is_running, read_status, steps_done
from triplane.launcher.preflight import CONFIG
from triplane.launcher.slurm import client as slurm
from triplane.launcher.slurm.snapshot import JOB_ID, SCRIPT, last_submission
from triplane.training.failure import LOGS
from triplane.training.stopping import STOP
from triplane.training.units import format_duration

_POLL_S = 0.5
_OBEY_S = 60.0
"""How long a run on this machine may take to obey, at least; a step must end, and a save."""


def job_of(run_dir: Path) -> slurm.Job | None:
    """The last job of a run; None if it has none, or none that Slurm remembers."""
    submission = last_submission(run_dir)
    if submission is None or not slurm.is_here():
        return None
    return slurm.find_job((submission / JOB_ID).read_text().strip())


def active_job(run_dir: Path) -> slurm.Job | None:
    """The job of a run that is in the queue or runs."""
    job = job_of(run_dir)
    return job if job and job.state in slurm.ACTIVE else None


def runs_in(folder: Path) -> list[Path]:
    """The run folders at or below `folder`; raises LaunchError if there are none."""
    if runs := find_runs(folder):
        return runs
    raise LaunchError(f"{folder}: no run in it or below it; give a run folder or one with some below")


def read_runs(folder: Path) -> tuple[list[RunStatus], dict[Path, str]]:
    """The runs at or below `folder`, and a line on each that cannot be read."""
    runs, unreadable = [], {}
    for run_dir in runs_in(folder):
        try:
            runs.append(read_status(run_dir))
        except LaunchError as error:
            unreadable[run_dir] = str(error)
    return runs, unreadable


def status(folder: Path) -> None:
    """Prints a line on each run at or below `folder`."""
    rows = [("run", "state", "step", "loss", "checkpoint", "restarts", "last word")]
    runs, unreadable = read_runs(folder)
    for run in runs:
        loss = f"{run.metrics['loss']:.4f}" if "loss" in run.metrics else "-"
        checkpoint = "-" if run.checkpoint_step is None else str(run.checkpoint_step)
        age = "-" if run.updated_s is None else f"{format_duration(time.time() - run.updated_s)} ago"
        progress = f"{run.step}/{run.steps}"
        rows.append((str(run.run_dir), state_of(run), progress, loss, checkpoint, str(run.restarts), age))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows if runs else []:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())
    for line in unreadable.values():
        print(line)


def logs(run_dir: Path, rank: int | None, follow: bool) -> None:
    """Prints the newest log of a rank, or the job's; with `follow`, what is added and newer ones, until interrupted."""
    path = _newest_log(run_dir, rank)
    lines = path.open(errors="replace")
    print(f"==> {path}")
    with suppress(KeyboardInterrupt):
        while True:
            newest = _newest_log(run_dir, rank)
            print(lines.read(), end="", flush=True)
            if newest != path:
                lines.close()
                path, lines = newest, newest.open(errors="replace")
                print(f"==> {path}")
            elif follow:
                time.sleep(_POLL_S)
            else:
                return


def _newest_log(run_dir: Path, rank: int | None) -> Path:
    folder, pattern = run_dir / LOGS, "job.log" if rank is None else f"rank_{rank}.*.log"
    if found := list(folder.glob(pattern)):
        return max(found, key=lambda file: file.stat().st_mtime_ns)
    there = ", ".join(sorted(file.name for file in folder.glob("*.log")))
    if not there:
        raise LaunchError(f"{run_dir}: no logs in there; give the folder of a run with a job or several ranks")
    advice = ": give --rank" if rank is None else ""
    raise LaunchError(f"{folder / pattern}: no such log; there are {there}{advice}")


def cancel(run_dir: Path) -> None:
    """Ends the job of a run, or asks a run without one to leave and waits until it has."""
    job = active_job(run_dir)
    if job is not None:
        slurm.cancel(job.id)
        print(f"job {job.id} is cancelled; `triplane resume {run_dir}` goes on from the last checkpoint")
        return
    run = read_status(run_dir)
    if not is_running(run_dir):
        raise LaunchError(f"{run_dir}: no job of this run is queued, and it is not running: {state_of(run)}")
    stop = run_dir / STOP
    stop.touch()
    deadline_s = time.monotonic() + _OBEY_S + 3 * run.metrics.get("step_time_s", 0.0)
    while stop.exists():
        if time.monotonic() > deadline_s:
            stop.unlink()
            raise LaunchError(f"{run_dir}: no process responded to {stop} in time; it is removed again")
        time.sleep(_POLL_S)
    print(f"{run_dir} has saved and left")


def resume(run_dir: Path) -> None:
    """Queues the last submission again."""
    submission = last_submission(run_dir)
    if submission is None:
        raise LaunchError(f"{run_dir}: it was never submitted; `triplane submit CONFIG` queues it")
    if not slurm.is_here():
        raise LaunchError("no Slurm here: sbatch is not on the PATH; run this where jobs are submitted")
    if steps_done(run_dir) >= load_config(submission / CONFIG).training.steps:
        raise LaunchError(f"{run_dir}: the run is done; submit it with more training.steps to go on")
    if job := active_job(run_dir):
        raise LaunchError(f"{run_dir}: job {job.id} is {job.state} already")
    for name in ("crashes", "bad_nodes"):  # that were mended since
        (submission / name).unlink(missing_ok=True)
    job_id = slurm.submit(submission / SCRIPT)
    (submission / JOB_ID).write_text(f"{job_id}\n")
    print(f"job {job_id}: {run_dir} goes on by {submission / SCRIPT}")


def may_move(run: RunStatus) -> bool:
    """Whether the run is being trained, or waits to be."""
    return not run.done and (is_running(run.run_dir) or active_job(run.run_dir) is not None)


def state_of(run: RunStatus) -> str:
    """That of its job, if Slurm knows it, or else what its lock and its last event say."""
    if run.done:
        return "done"
    if job := job_of(run.run_dir):
        if job.state == "PENDING":
            return f"job {job.id} PENDING ({job.reason})"
        return f"job {job.id} {job.state}" + (f" on {job.nodes}" if job.state == "RUNNING" else "")
    if is_running(run.run_dir):
        return "running"
    if run.last_event is None:
        return "not begun"
    return {"end": "stopped", "failure": "failed"}.get(run.last_event["event"], "died")
