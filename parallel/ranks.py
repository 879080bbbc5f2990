"""Where this process stands among the ranks that torchrun, srun or `launcher/local.py` started."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from triplane.parallel.environment import whole_number
from triplane.storage.errors import LaunchError

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
    shown_apart: bool = False
    """Slurm started it, which may show each task only the GPU that is its own."""


def current_rank(environment: Mapping[str, str]) -> Rank | None:
    """This process as torchrun, or srun with a task for each rank, describes it; None if nobody started ranks.

    Raises LaunchError if a variable is missing or senseless, or if torchrun would start ranks again that then wait for
    each other for ever.
    """
    restarts = whole_number(environment, "TORCHELASTIC_MAX_RESTARTS", default=0)
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise LaunchError(
            f"torchrun --max-restarts {restarts}: ranks that are started again would read what the dead ones left in "
            "torchrun's store; give --rdzv-backend c10d --rdzv-endpoint HOST:PORT instead of --master-addr, and set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        world_size = whole_number(environment, "WORLD_SIZE", least=1)
        local_size = whole_number(environment, "LOCAL_WORLD_SIZE", default=1, least=1)
        # A rank alone on its machine, as `LOCAL_WORLD_SIZE` unset says, may yet be told to take another GPU.
        most = local_size if "LOCAL_WORLD_SIZE" in environment else None
        return Rank(
            whole_number(environment, "RANK", below=world_size),
            world_size,
            whole_number(environment, "LOCAL_RANK", default=0, below=most),
            local_size,
        )
    # The batch script of a job has SLURM_PROCID too; only a step's tasks have this.
    if "SLURM_STEP_NUM_TASKS" in environment:
        world_size = whole_number(environment, "SLURM_STEP_NUM_TASKS", least=1)
        # "4(x2),3" are the tasks of each node.
        tasks = re.split(r"\D", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))[0]
        return Rank(
            whole_number(environment, "SLURM_PROCID", below=world_size),
            world_size,
            whole_number(environment, "SLURM_LOCALID"),
            whole_number({"SLURM_STEP_TASKS_PER_NODE": tasks}, "SLURM_STEP_TASKS_PER_NODE", least=1),
            shown_apart=True,
        )
    return None


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Of MASTER_ADDR and MASTER_PORT what is not set, as all tasks of a Slurm step agree on it.

    The address is that of its first node, the port follows from the job id.
    """
    missing = {"MASTER_ADDR", "MASTER_PORT"} - environment.keys()
    if "MASTER_PORT" not in missing:
        whole_number(environment, "MASTER_PORT", least=1, below=2**16)
    if missing and "SLURM_STEP_NODELIST" not in environment:
        raise LaunchError(f"{' and '.join(sorted(missing))} not set; set MASTER_ADDR and MASTER_PORT for every rank")
    found = {}
    if "MASTER_ADDR" in missing:
        nodes = environment["SLURM_STEP_NODELIST"]
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if listed.returncode:
            raise LaunchError(f"scontrol cannot read the node list {nodes}: {listed.stderr.strip()}; set MASTER_ADDR")
        found["MASTER_ADDR"] = listed.stdout.split()[0]
    if "MASTER_PORT" in missing:
        found["MASTER_PORT"] = str(_FIRST_PORT + whole_number(environment, "SLURM_JOB_ID") % _PORTS)
    return found
