"""Runs the Slurm commands that a run needs, without sacct, which few clusters let everyone use."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from triplane.storage.errors import LaunchError

ACTIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "STOPPED"}
"""States of a job that has not ended."""


@dataclass(frozen=True)
class Partition:
    """A partition's nodes and time limits."""

    name: str
    default: bool
    default_s: float
    """Default time limit of a job."""
    max_s: float
    nodes: int
    cpus_per_node: int
    """CPUs of the smallest node, as for the GPUs."""
    gpus_per_node: int


@dataclass(frozen=True)
class Job:
    """A job known to Slurm, which forgets jobs some minutes after they end."""

    id: str
    """The array's id if the job belongs to one."""
    state: str
    reason: str
    """Why it is pending."""
    nodes: str
    restarts: int


def is_here() -> bool:
    """Returns whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def is_out_of_reach() -> bool:
    """Whether Slurm's commands find no controller."""
    return subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode != 0


def has_containers() -> bool:
    """Returns whether the cluster has pyxis, which runs the tasks of a step in a container."""
    return "--container-image" in _run("srun", "--help")


def partition(name: str | None) -> Partition:
    """Finds a partition by name, or the default one for None. Raises LaunchError if there is none."""
    found = [_partition(line) for line in _records("partition")]
    for candidate in found:
        if candidate.name == name or (name is None and candidate.default):
            return candidate
    known = ", ".join(candidate.name for candidate in found)
    if name is None:
        raise LaunchError(f"Slurm has no default partition here; give --partition, one of {known}")
    raise LaunchError(f"--partition {name}: there is none of this name; there are {known}")


def submit(script: Path) -> str:
    """Queues a batch script; returns the job's id. Raises LaunchError with Slurm's reason if it is refused."""
    return _run("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def find_job(job: str) -> Job | None:
    """Finds a job, preferring an array's running job, then a pending one; None if Slurm has forgotten it."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=False)
    if "Invalid job id" in shown.stderr:
        return None
    if shown.returncode:
        raise LaunchError(f"scontrol show job {job}: {shown.stderr.strip()}")
    jobs = [_job(line) for line in shown.stdout.splitlines() if line]
    order = ["RUNNING", "COMPLETING", "PENDING"]
    return min(jobs, key=lambda job: order.index(job.state) if job.state in order else len(order), default=None)


def cancel(job: str) -> None:
    """Cancels a running or queued job."""
    _run("scancel", job)


def limit_s(text: str) -> float:
    """Parses a Slurm time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises LaunchError if it is invalid."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise LaunchError(f"--time {text}: not a time of Slurm's; give minutes, H:M:S or D-H, for example 12:00:00")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    # Slurm takes 0 as no limit.
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or float("inf")


def _partition(fields: dict[str, str]) -> Partition:
    max_s = limit_s(fields["MaxTime"])
    default = fields["DefaultTime"]
    nodes = _records("node", fields["Nodes"]) if fields["Nodes"] != "(null)" else []
    return Partition(
        name=fields["PartitionName"],
        default=fields["Default"] == "YES",
        default_s=max_s if default == "NONE" else limit_s(default),
        max_s=max_s,
        nodes=len(nodes),
        cpus_per_node=min((int(node["CPUTot"]) for node in nodes), default=0),
        gpus_per_node=min((_gpus(node["Gres"]) for node in nodes), default=0),
    )


def _gpus(resources: str) -> int:
    """Counts the GPUs in a string such as `gpu:h100:8(S:0-1),nic:1`."""
    counts = re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources)
    return sum(map(int, counts))


def _job(line: str) -> Job:
    fields = _fields(line)
    return Job(
        id=fields.get("ArrayJobId", fields["JobId"]),
        state=fields["JobState"],
        reason=fields["Reason"],
        nodes=fields.get("NodeList", ""),
        restarts=int(fields["Restarts"]),
    )


def _records(kind: str, *names: str) -> list[dict[str, str]]:
    shown = _run("scontrol", "show", kind, "--oneliner", *names)
    return [_fields(line) for line in shown.splitlines() if line]


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise LaunchError(f"{command[0]}: {lines[-1].removeprefix(f'{command[0]}: ')}")
    return done.stdout
