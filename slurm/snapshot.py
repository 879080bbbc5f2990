"""Copies a job's code, config and environment into the run folder, so that later edits do not affect the job."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from itertools import count
from pathlib import Path

import triplane
from triplane.config.toml import to_toml
from triplane.training.config import RunConfig
from triplane.training.run_folder import CONFIG, RunFolder

JOB_ID = "job_id"
_CODE, _GIT = "code", "git.txt"
_COMMIT_DIGITS = 12
SCRIPT = "train.sbatch"


def next_submission(run_dir: Path) -> Path:
    """Returns the folder for the next submission of a run."""
    return next(path for number in count(1) if not (path := RunFolder(run_dir).jobs / str(number)).exists())


def last_submission(run_dir: Path) -> Path | None:
    """Returns the newest submission that Slurm has accepted."""
    submitted = [path.parent for path in RunFolder(run_dir).jobs.glob(f"*/{JOB_ID}")]
    return max(submitted, key=lambda path: int(path.name), default=None)


def take_snapshot(folder: Path, config: RunConfig) -> None:
    """Writes `code/`, `config.toml`, `environment.txt`, and `git.txt` if the code is in a repository."""
    code = Path(triplane.__file__).parent
    # The rooms may be links into a checkout; what is copied stands by itself.
    shutil.copytree(code, folder / _CODE / code.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / CONFIG).write_text(to_toml(config))
    (folder / "environment.txt").write_text(_environment())
    status = _git("status", "--short", "--branch")
    if status is not None:
        parts = [_git("log", "-1", "--format=commit %H%n%s"), status, _git("diff", "HEAD")]
        (folder / _GIT).write_text("\n".join(part or "" for part in parts))


def _environment() -> str:
    """Describes host, packages and variables, without the variables' values, which may be secrets."""
    packages = {f"{package.metadata['Name']}=={package.version}" for package in distributions()}
    return "\n".join(
        [
            f"host {platform.node()}, {platform.platform()}",
            f"python {platform.python_version()}, {sys.executable}",
            "",
            *sorted(packages, key=str.lower),
            "",
            "environment variables: " + " ".join(sorted(os.environ)),
            "",
        ]
    )


def commit_of_code() -> str | None:
    """Returns the commit of the code that runs, also of a snapshot; None if it is in no repository."""
    folder = Path(triplane.__file__).parent.parent
    if folder.name == _CODE and (folder.parent / _GIT).exists():
        return (folder.parent / _GIT).read_text().partition("\n")[0].removeprefix("commit ")[:_COMMIT_DIGITS]
    if _git("ls-files", "--error-unmatch", __file__) is None:  # the repository around is another's
        return None
    commit = _git("describe", "--always", "--dirty", f"--abbrev={_COMMIT_DIGITS}", "--exclude=*")
    return None if commit is None else commit.strip()


def _git(*arguments: str) -> str | None:
    """Returns git's output; None without git or a repository."""
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
