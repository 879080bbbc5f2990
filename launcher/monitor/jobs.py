"""`triplane status`, `logs` and `cancel`, for runs on this machine or as jobs."""

import time
from contextlib import suppress
from pathlib import Path

from triplane.launcher.monitor.run_status import RunStatus, find_runs, read_status
from triplane.launcher.monitor.table import print_table
from triplane.slurm import client as slurm
from triplane.slurm.jobs import active_job, job_of
from triplane.storage.errors import LaunchError
from triplane.training.run_folder import RunFolder
from triplane.training.units import format_duration

_POLL_S = 0.5
_OBEY_S = 60.0
"""Minimum time for a run on this machine to finish a step and save."""


def runs_in(folder: Path) -> list[Path]:
    """Returns the run folders at or below `folder`; raises LaunchError if there are none."""
    if runs := find_runs(folder):
        return runs
    raise LaunchError(
        f"{folder}: not a run folder, and contains none; give a run folder or a folder that contains some"
    )


def read_runs(folder: Path) -> tuple[list[RunStatus], dict[Path, str]]:
    """Returns the runs at or below `folder`, and a line on each that cannot be read."""
    runs, unreadable = [], {}
    for run_dir in runs_in(folder):
        try:
            runs.append(read_status(run_dir))
        except LaunchError as error:
            unreadable[run_dir] = str(error)
    return runs, unreadable


def status(folder: Path) -> None:
    """Prints a line for each run at or below `folder`, with the columns that fit on the terminal."""
    head = ("run", "state", "step", "loss", "checkpoint", "restarts", "last update")
    rows: dict[Path, tuple[str, ...]] = {}
    runs, unreadable = read_runs(folder)
    for run in runs:
        loss = f"{run.metrics['loss']:.4f}" if "loss" in run.metrics else "-"
        checkpoint = "-" if run.checkpoint_step is None else str(run.checkpoint_step)
        age = "-" if run.updated_s is None else f"{format_duration(time.time() - run.updated_s)} ago"
        progress = f"{run.step}/{run.steps}"
        rows[run.run_dir] = (str(run.run_dir), state_of(run), progress, loss, checkpoint, str(run.restarts), age)
    for run_dir in unreadable:
        rows[run_dir] = (str(run_dir), unread_state(run_dir), *["-"] * (len(head) - 2))
    print_table([head, *(rows[run_dir] for run_dir in sorted(rows))])
    for line in unreadable.values():
        print(line)


def logs(run_dir: Path, rank: int | None, follow: bool) -> None:
    """Prints the newest log of a rank, or of the job; with `follow`, also new output and logs, until interrupted."""
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
    folder, pattern = RunFolder(run_dir).logs, RunFolder(run_dir).job_log.name if rank is None else f"rank_{rank}.*.log"
    if found := list(folder.glob(pattern)):
        return max(found, key=lambda file: file.stat().st_mtime_ns)
    there = ", ".join(sorted(file.name for file in folder.glob("*.log")))
    if not there:
        raise LaunchError(f"{run_dir}: no logs; give the folder of a run that has started")
    advice = ": give --rank" if rank is None else ""
    raise LaunchError(f"{folder / pattern}: no such log; found {there}{advice}")


def cancel(run_dir: Path) -> None:
    """Cancels the job of a run, or asks a run without one to exit and waits until it has."""
    job = active_job(run_dir)
    if job is not None:
        slurm.cancel(job.id)
        print(f"job {job.id} is cancelled; `triplane resume {run_dir}` resumes from the last checkpoint")
        return
    run = read_status(run_dir)
    if not RunFolder(run_dir).is_running():
        raise LaunchError(f"{run_dir}: no job of this run is queued, and it is not running: {state_of(run)}")
    stop = RunFolder(run_dir).stop
    stop.touch()
    deadline_s = time.monotonic() + _OBEY_S + 3 * run.metrics.get("step_time_s", 0.0)
    while stop.exists():
        if time.monotonic() > deadline_s:
            stop.unlink()
            raise LaunchError(f"{run_dir}: no process responded to {stop} in time; the file has been removed")
        time.sleep(_POLL_S)
    print(f"{run_dir} has saved and exited")


def may_move(run: RunStatus) -> bool:
    """Returns whether the run is running or queued."""
    return not run.done and (RunFolder(run.run_dir).is_running() or active_job(run.run_dir) is not None)


def unread_state(run_dir: Path) -> str:
    """Returns the state of a run whose files cannot be read: its first seconds, or a fault."""
    return "starting" if RunFolder(run_dir).is_running() else "unreadable"


def state_of(run: RunStatus) -> str:
    """Returns the state of the run's job if Slurm knows it, else the state by its lock and last event."""
    if run.done:
        return "completed"
    if job := job_of(run.run_dir):
        if job.state == "PENDING":
            return f"job {job.id} PENDING ({job.reason})"
        return f"job {job.id} {job.state}" + (f" on {job.nodes}" if job.state == "RUNNING" else "")
    if RunFolder(run.run_dir).is_running():
        return "running"
    if run.last_event is None:
        return "not started"
    last = run.last_event
    if last["event"] == "end":  # of earlier versions
        return "completed" if last["step"] >= run.steps else "stopped"
    return {"stopped": "stopped", "failure": "failed"}.get(last["event"], "died")
