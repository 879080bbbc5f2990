"""Finds and resumes the last job of a run."""

from pathlib import Path

from triplane.config.load import load_config
from triplane.slurm import client as slurm
from triplane.slurm.snapshot import JOB_ID, SCRIPT, last_submission
from triplane.storage.errors import LaunchError
from triplane.training.run_folder import CONFIG, RunFolder


def job_of(run_dir: Path) -> slurm.Job | None:
    """Returns the last job of a run; None if it has none, or Slurm has forgotten it."""
    submission = last_submission(run_dir)
    if submission is None or not slurm.is_here():
        return None
    return slurm.find_job((submission / JOB_ID).read_text().strip())


def active_job(run_dir: Path) -> slurm.Job | None:
    """Returns the job of a run if it is queued or running."""
    job = job_of(run_dir)
    return job if job and job.state in slurm.ACTIVE else None


def resume(run_dir: Path) -> None:
    """Queues the last submission of a run again."""
    submission = last_submission(run_dir)
    if submission is None:
        raise LaunchError(f"{run_dir}: it was never submitted; `triplane submit CONFIG` queues it")
    if not slurm.is_here():
        raise LaunchError("no Slurm here: sbatch is not on the PATH; run this where jobs are submitted")
    if RunFolder(run_dir).steps_done() >= load_config(submission / CONFIG).training.steps:
        raise LaunchError(f"{run_dir}: the run is done; submit it with more training.steps to continue")
    if job := active_job(run_dir):
        raise LaunchError(f"{run_dir}: job {job.id} is {job.state} already")
    for name in ("crashes", "bad_nodes"):  # fixed since, or the user would not resume
        (submission / name).unlink(missing_ok=True)
    job_id = slurm.submit(submission / SCRIPT)
    (submission / JOB_ID).write_text(f"{job_id}\n")
    print(f"job {job_id}: {run_dir} continues with {submission / SCRIPT}")
