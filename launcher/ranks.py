"""Where this process stands among the ranks, and how ranks are started on this machine."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from triplane.launcher.errors import LaunchError

_FIRST_PORT = 20_000
_PORTS = 20_000


@dataclass(frozen=True)
class Rank:
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int
    """Number on its machine: the GPU that it takes."""
    local_size: int = 1
    """Ranks on its machine."""


def current_rank(environment: Mapping[str, str]) -> Rank | None:
    """This process as torchrun, or srun with a task for each rank, describes it; None if neither started it."""
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return Rank(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("LOCAL_WORLD_SIZE", 1)),
        )
    # The batch script of a job has SLURM_PROCID too; only a step's tasks have this.
    if "SLURM_STEP_NUM_TASKS" in environment:
        return Rank(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            # "4(x2),3" are the tasks of each node.
            int(re.split(r"\D", environment["SLURM_STEP_TASKS_PER_NODE"])[0]),
        )
    return None


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """The MASTER_ADDR and MASTER_PORT that all tasks of a step agree on: its first node, a port from the job id."""
    nodes = environment["SLURM_STEP_NODELIST"]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise LaunchError(f"scontrol cannot read the node list {nodes}: {listed.stderr.strip()}; set MASTER_ADDR")
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS
    return {"MASTER_ADDR": listed.stdout.split()[0], "MASTER_PORT": str(port)}


def start_local_ranks(count: int, arguments: Sequence[str], log_dir: Path) -> int:
    """Runs `triplane` with `arguments` on `count` ranks of this machine; returns the exit code.

    Rank 0 has this console; the others write into `log_dir`.
    """
    import sys

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Else the agent's store serves the ranks too, and a restart on gloo meets its predecessor's keys.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="local",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(str(log_dir), redirects=dict.fromkeys(range(1, count), Std.ALL)),
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "triplane", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if rank:
            print(f"rank {rank} failed first, exit code {failure.exitcode}; see {log_dir}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
