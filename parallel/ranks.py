"""Finds this process's place among the ranks that torchrun, srun or `launcher/local.py` started."""

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
    """Its number on its machine, which selects its GPU."""
    local_size: int = 1
    """Ranks on its machine."""
    shown_apart: bool = False
    """True if Slurm started it, which may show each task only its own GPU."""


def current_rank(environment: Mapping[str, str]) -> Rank | None:
    """Returns this process as torchrun, or srun with one task per rank, describes it; None outside both.

    Raises LaunchError if a variable is missing or invalid, or if torchrun would restart ranks that then wait for each
    other forever.
    """
    restarts = whole_number(environment, "TORCHELASTIC_MAX_RESTARTS", default=0)
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise LaunchError(
            f"torchrun --max-restarts {restarts}: restarted ranks would read what the dead ones left in torchrun's "
            "store; give --rdzv-backend c10d --rdzv-endpoint HOST:PORT instead of --master-addr, and set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        world_size = whole_number(environment, "WORLD_SIZE", least=1)
        local_size = whole_number(environment, "LOCAL_WORLD_SIZE", default=1, least=1)
        # LOCAL_WORLD_SIZE unset means one rank on this machine, whose LOCAL_RANK may still select another GPU.
        most = local_size if "LOCAL_WORLD_SIZE" in environment else None
        return Rank(
            rank=whole_number(environment, "RANK", below=world_size),
            world_size=world_size,
            local_rank=whole_number(environment, "LOCAL_RANK", default=0, below=most),
            local_size=local_size,
        )
    # A job's batch script has SLURM_PROCID too; only a step's tasks have this.
    if "SLURM_STEP_NUM_TASKS" in environment:
        world_size = whole_number(environment, "SLURM_STEP_NUM_TASKS", least=1)
        # "4(x2),3" lists the tasks of each node.
        tasks = re.split(r"\D", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))[0]
        return Rank(
            rank=whole_number(environment, "SLURM_PROCID", below=world_size),
            world_size=world_size,
            local_rank=whole_number(environment, "SLURM_LOCALID"),
            local_size=whole_number({"SLURM_STEP_TASKS_PER_NODE": tasks}, "SLURM_STEP_TASKS_PER_NODE", least=1),
            shown_apart=True,
        )
    # Libraries read these without asking who set them.
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1")):
        if (given := environment.get(name, alone)) != alone:
            raise LaunchError(f"{name} is {given!r}, but no launcher started ranks: unset it, or set MASTER_ADDR too")
    return None


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns whichever of MASTER_ADDR and MASTER_PORT is not set, the same for all tasks of a Slurm step.

    The address is that of the step's first node; the port derives from the job id.
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
