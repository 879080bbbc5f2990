"""Where this process stands among the ranks that torchrun, srun or `launcher/local.py` started."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

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
    """This process as torchrun, or srun with a task for each rank, describes it; None if nobody started ranks.

    Raises LaunchError if torchrun would start ranks again that then wait for each other for ever.
    """
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise LaunchError(
            f"torchrun --max-restarts {restarts}: ranks that are started again would read what the dead ones left in "
            "torchrun's store; give --rdzv-backend c10d --rdzv-endpoint HOST:PORT instead of --master-addr, and set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
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
