"""Slurm's commands, as far as a run needs them; sacct is not, since few clusters let everyone use it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from triplane.storage.errors import LaunchError

ACTIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "STOPPED"}
"""States of a job that still is to do something."""


@dataclass(frozen=True)
class Partition:
    """Some nodes, and for how long a job may have them."""

    name: str
    default: bool
    default_s: float
    """The time limit of a job that asks for none."""
    max_s: float
    nodes: int
    cpus_per_node: int
    """Of the smallest node; GPUs too."""
    gpus_per_node: int


@dataclass(frozen=True)
class Job:
    """A job that Slurm remembers; it forgets those that have ended after some minutes."""

    id: str
    """Of the whole array, if it is one of an array."""
    state: str
    reason: str
    """Why it waits."""
    nodes: str
    restarts: int


def is_here() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def has_containers() -> bool:
    """Whether the cluster has pyxis, which starts the tasks of a step in a container."""
    return "--container-image" in _run("srun", "--help")


def partition(name: str | None) -> Partition:
    """The partition of this name; None: the default one. Raises LaunchError if there is none."""
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
    """A job, or of an array the one that runs, or else waits; None if Slurm has forgotten it."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=False)
    if "Invalid job id" in shown.stderr:
        return None
    if shown.returncode:
        raise LaunchError(f"scontrol show job {job}: {shown.stderr.strip()}")
    jobs = [_job(line) for line in shown.stdout.splitlines() if line]
    order = ["RUNNING", "COMPLETING", "PENDING"]
    return min(jobs, key=lambda job: order.index(job.state) if job.state in order else len(order), default=None)


def cancel(job: str) -> None:
    """Ends a job, or takes it from the queue."""
    _run("scancel", job)


def limit_s(text: str) -> float:
    """A time as Slurm writes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises LaunchError if it is no such time."""
    if text in ("UNLIMITED", "INFINITE"):
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
    # To Slurm a limit of 0 is none.
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or float("inf")


def _partition(fields: dict[str, str]) -> Partition:
    max_s = limit_s(fields["MaxTime"])
    default = fields["DefaultTime"]
    nodes = _records("node", fields["Nodes"]) if fields["Nodes"] != "(null)" else []
    return Partition(
        fields["PartitionName"],
        fields["Default"] == "YES",
        max_s if default == "NONE" else limit_s(default),
        max_s,
        len(nodes),
        min((int(node["CPUTot"]) for node in nodes), default=0),
        min((_gpus(node["Gres"]) for node in nodes), default=0),
    )


def _gpus(resources: str) -> int:
    """`gpu:h100:8(S:0-1),nic:1` has 8."""
    counts = re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources)
    return sum(map(int, counts))


def _job(line: str) -> Job:
    fields = _fields(line)
    return Job(
        fields.get("ArrayJobId", fields["JobId"]),
        fields["JobState"],
        fields["Reason"],
        fields.get("NodeList", ""),
        int(fields["Restarts"]),
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
