"""Fills in the batch script of a run, from the template `slurm/train.sbatch`."""

import math
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from triplane.plan.disk import checkpoint_bytes
from triplane.slurm.client import Partition
from triplane.training.config import RunConfig
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import EVENTS, METRICS_RECORDS, read_log

_WRITE_BYTES_PER_S = 200e6
"""Write rate of one node, assumed until the run has measured a save."""
_LIMIT_PERIOD_S = 60
"""Slurm checks the limits every half minute, and warns up to a minute early."""


@dataclass(frozen=True)
class Request:
    """The user's request to Slurm."""

    nodes: str
    """`4`, or `2-4`: as many as are free."""
    ranks_per_node: int | None
    """None: the GPUs of a node, or what the layout needs."""
    time: str | None
    partition: str | None
    account: str | None
    container: str | None
    """Image for pyxis."""
    chain: int | None
    """Number of jobs that follow each other, instead of one that requeues itself."""
    allow_data_change: bool
    allow_fresh_start: bool
    """Both apply until the submission has saved for the first time."""


@dataclass(frozen=True)
class Order:
    """A run, and where to run it."""

    config: RunConfig
    request: Request
    fewest_nodes: int
    most_nodes: int
    ranks_per_node: int
    partition: Partition | None
    """None without Slurm."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir).absolute()

    @cached_property
    def warning_s(self) -> int:
        """How long before its limit a job starts to save: twice the longest step and save so far."""
        lines = read_log(RunFolder(self.run_dir).metrics, METRICS_RECORDS)[-1000:]
        step_s = max((line.get("step_time_s", 0) for line in lines), default=0)
        saves_s = [line["checkpoint_time_s"] for line in lines if "checkpoint_time_s" in line]
        estimate_s = checkpoint_bytes(self.config) / _WRITE_BYTES_PER_S / self.fewest_nodes
        return _LIMIT_PERIOD_S + math.ceil(2 * (step_s + max(saves_s, default=estimate_s)))


def batch_script(order: Order, submission: Path) -> str:
    """Fills in the `{{names}}` of the template; `submission` is the folder of the job's code and config."""
    request = order.request
    cpus_per_rank = max(1, order.partition.cpus_per_node // order.ranks_per_node) if order.partition else 1
    options = {"time": request.time, "partition": request.partition, "account": request.account}
    if request.chain:
        options["array"] = f"1-{request.chain}%1"
    if order.partition and order.partition.gpus_per_node:
        options["gpus-per-node"] = str(order.ranks_per_node)
    srun_options = [f"--ntasks-per-node={order.ranks_per_node}"]
    if order.partition:
        srun_options.append(f"--cpus-per-task={cpus_per_rank}")
    if request.container:
        srun_options += [
            f"--container-image={request.container}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in _mounted(order))}",
            f"--container-workdir={Path.cwd()}",
        ]
    values = {
        "name": order.run_dir.name,
        "nodes": request.nodes,
        "directory": str(Path.cwd()),
        "run": str(order.run_dir),
        "steps": str(order.config.training.steps),
        "submission": str(submission),
        "python": "python3" if request.container else sys.executable,
        "cpus_per_rank": str(cpus_per_rank),
        "warning_s": str(order.warning_s),
        "fewest_nodes": str(order.fewest_nodes),
        "max_crashes": str(order.config.faults.max_restarts),
        "saves": str(sum(event["event"] == "save" for event in read_log(RunFolder(order.run_dir).history, EVENTS))),
    }
    values = {name: shlex.quote(value) for name, value in values.items()}
    values["options"] = "\n".join(f"#SBATCH --{name}={shlex.quote(value)}" for name, value in options.items() if value)
    values["srun_options"] = " ".join(map(shlex.quote, srun_options))
    allowed = {"--allow-data-change": request.allow_data_change, "--allow-fresh-start": request.allow_fresh_start}
    values["allowed"] = " ".join(flag for flag, given in allowed.items() if given)
    template = (resources.files("triplane") / "slurm" / "train.sbatch").read_text()
    return re.sub(r"{{(\w+)}}", lambda match: values[match[1]], template)


def _mounted(order: Order) -> list[Path]:
    """Returns the folders to mount in a container: the run's, the current one, and those that the config names."""
    config = order.config
    named = [config.data.tokenizer, config.checkpoint.initial, config.checkpoint.folder]
    named += [source.corpus for source in config.data.sources]
    local = (Path(name).absolute() for name in named if name and "://" not in name)
    return sorted({order.run_dir, Path.cwd(), *(path if path.is_dir() else path.parent for path in local)})
