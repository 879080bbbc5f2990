"""`triplane submit`: checks everything that can be known, then queues a job with Slurm."""

import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from triplane.launcher import slurm
from triplane.launcher.config import RunConfig, load_config
from triplane.launcher.errors import ConfigError, LaunchError
from triplane.launcher.jobs import active_job
from triplane.launcher.preflight import DONE
from triplane.launcher.snapshot import JOB_ID, SCRIPT, next_submission, take_snapshot
from triplane.launcher.train import problems
from triplane.model.count import count_parameters

_BYTES_PER_PARAMETER = 12
"""Of a checkpoint: fp32 weight and two moments."""
_WRITE_BYTES_PER_S = 200e6
"""Of one node, if the run has not shown yet how long a save takes."""
_LIMIT_PERIOD_S = 60
"""Slurm looks at the limits every half minute, and warns up to as much too early."""
_START_S = 60
"""Until the first step: imports, the check of the nodes, reading the checkpoint."""


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm."""

    nodes: str
    """`4`, or `2-4`: as many of them as are free."""
    ranks_per_node: int | None
    """None: the GPUs of a node, or what the layout needs."""
    time: str | None
    partition: str | None
    account: str | None
    container: str | None
    """Image for pyxis."""
    chain: int | None
    """Jobs that follow each other, instead of one that goes back into the queue."""


def submit(path: Path, overrides: list[str], request: Request, dry_run: bool) -> None:
    """Queues the run that the config says and prints the job's id; with `dry_run` prints the batch script."""
    config = load_config(path, overrides)
    run_dir = Path(config.run_dir).absolute()
    cluster = None
    if slurm.is_here():
        cluster = slurm.partition(request.partition)
    elif not dry_run:
        raise LaunchError("no Slurm here: sbatch is not on the PATH; run this where jobs are submitted, or --dry-run")
    fewest, most = _nodes(request.nodes)
    ranks_per_node = request.ranks_per_node or _ranks_per_node(config, fewest, most, cluster)
    _check(config, request, fewest, most, ranks_per_node, cluster)
    folder = next_submission(run_dir)
    script = _script(config, request, folder, fewest, ranks_per_node, cluster)
    if dry_run:
        print(script, end="")
        if cluster is None:
            print("triplane: no Slurm here: partition, nodes and time limit are not checked", file=sys.stderr)
        return
    job = _queue(config, run_dir, folder, script)
    print(f"job {job}: {config.run_dir} on {request.nodes} nodes x {ranks_per_node} ranks; submitted {folder / SCRIPT}")


def _queue(config: RunConfig, run_dir: Path, folder: Path, script: str) -> str:
    """Leaves nothing behind if Slurm refuses."""
    logs = run_dir / "logs"  # Slurm makes none
    made = [_first_missing(folder), *([] if logs.exists() else [logs])]
    try:
        folder.mkdir(parents=True)
        logs.mkdir(exist_ok=True)
        take_snapshot(folder, config)
        (folder / SCRIPT).write_text(script)
        job = slurm.submit(folder / SCRIPT)
    except BaseException:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        raise
    (folder / JOB_ID).write_text(f"{job}\n")
    (run_dir / DONE).unlink(missing_ok=True)  # of fewer steps
    return job


def _first_missing(folder: Path) -> Path:
    return next(path for path in reversed([folder, *folder.parents]) if not path.exists())


def _nodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise LaunchError(f"--nodes {text}: give a number, or a smallest and a largest one such as 2-4")
    return fewest, most


def _ranks_per_node(config: RunConfig, fewest: int, most: int, cluster: slurm.Partition | None) -> int:
    if cluster and cluster.gpus_per_node:
        return cluster.gpus_per_node
    one, dp = config.parallel.ranks_of_one, config.parallel.dp
    if dp != "auto" and fewest == most and one * dp % fewest == 0:
        return one * dp // fewest
    where = f"the nodes of partition {cluster.name} have no GPUs" if cluster else "the nodes are not known here"
    raise LaunchError(f"{where}: give --ranks-per-node, or a parallel.dp that spreads evenly over --nodes")


def _check(
    config: RunConfig,
    request: Request,
    fewest: int,
    most: int,
    ranks_per_node: int,
    cluster: slurm.Partition | None,
) -> None:
    found: dict[str, None] = {}  # in order, each once
    for nodes in range(fewest, most + 1):
        found |= dict.fromkeys(problems(config, nodes * ranks_per_node, False, False))
    found |= dict.fromkeys(_job_problems(config, request, fewest, ranks_per_node, cluster))
    if found:
        raise ConfigError("\n".join(found))


def _job_problems(
    config: RunConfig, request: Request, nodes: int, ranks_per_node: int, cluster: slurm.Partition | None
) -> Iterator[str]:
    done = Path(config.run_dir) / DONE
    if done.exists() and int(done.read_text()) >= config.training.steps:
        yield f"{config.run_dir}: all {config.training.steps} steps are done; raise training.steps to go on"
    limit_s = slurm.limit_s(request.time) if request.time else None
    if cluster is None:
        return
    if job := active_job(Path(config.run_dir)):
        yield f"{config.run_dir}: job {job.id} is {job.state}; `triplane cancel {config.run_dir}` first"
    if nodes > cluster.nodes:
        yield f"--nodes {request.nodes}: partition {cluster.name} has {cluster.nodes}"
    if ranks_per_node > (cluster.gpus_per_node or cluster.cpus_per_node):
        has = f"{cluster.gpus_per_node} GPUs and {cluster.cpus_per_node} CPUs"
        yield f"--ranks-per-node {ranks_per_node}: a node of partition {cluster.name} has {has}"
    if request.container and not slurm.has_containers():
        yield f"--container {request.container}: this Slurm has no pyxis; install it, or leave --container out"
    limit_s = cluster.default_s if limit_s is None else limit_s
    if limit_s > cluster.max_s:
        yield f"--time: partition {cluster.name} gives {_minutes(cluster.max_s)} min at most"
    warning_s = _warning_s(config, nodes)
    if limit_s < _START_S + warning_s:
        yield (
            f"the time limit, {_minutes(limit_s)} min, is too short for one checkpoint: {_START_S} s to start and "
            f"{warning_s} s for a step and a save at the end; give --time {_minutes(_START_S + warning_s)} or more"
        )


def _minutes(seconds: float) -> int:
    return math.ceil(seconds / 60)


def _warning_s(config: RunConfig, nodes: int) -> int:
    """How long before its limit a job must begin to save: twice what a step and a save took at most so far."""
    metrics = Path(config.run_dir) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[-1000:]] if metrics.exists() else []
    step_s = max((line.get("step_time_s", 0) for line in lines), default=0)
    saves_s = [line["checkpoint_time_s"] for line in lines if "checkpoint_time_s" in line]
    estimate_s = count_parameters(config.model) * _BYTES_PER_PARAMETER / _WRITE_BYTES_PER_S / nodes
    return _LIMIT_PERIOD_S + math.ceil(2 * (step_s + max(saves_s, default=estimate_s)))


def _script(
    config: RunConfig,
    request: Request,
    folder: Path,
    nodes: int,
    ranks_per_node: int,
    cluster: slurm.Partition | None,
) -> str:
    """The template with its `{{names}}` filled in."""
    run_dir = folder.parent.parent
    given = {"time": request.time, "partition": request.partition, "account": request.account}
    if request.chain:
        given["array"] = f"1-{request.chain}%1"
    if cluster and cluster.gpus_per_node:
        given["gpus-per-node"] = str(ranks_per_node)
    cpus_per_rank = max(1, cluster.cpus_per_node // ranks_per_node) if cluster else 1
    srun_options = [f"--ntasks-per-node={ranks_per_node}"]
    if cluster:
        srun_options.append(f"--cpus-per-task={cpus_per_rank}")
    options = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in given.items() if value]
    if request.container:
        srun_options += [
            f"--container-image={request.container}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in _mounted(config, run_dir))}",
            f"--container-workdir={Path.cwd()}",
        ]
    values = {
        "name": shlex.quote(run_dir.name),
        "nodes": request.nodes,
        "cpus_per_rank": str(cpus_per_rank),
        "directory": shlex.quote(str(Path.cwd())),
        "run": shlex.quote(str(run_dir)),
        "submission": shlex.quote(str(folder)),
        "python": "python3" if request.container else shlex.quote(sys.executable),
        "options": "\n".join(options),
        "srun_options": " ".join(map(shlex.quote, srun_options)),
        "warning_s": str(_warning_s(config, nodes)),
        "max_crashes": str(config.faults.max_restarts),
    }
    template = (resources.files("triplane") / "slurm" / "train.sbatch").read_text()
    return re.sub(r"{{(\w+)}}", lambda match: values[match[1]], template)


def _mounted(config: RunConfig, run_dir: Path) -> list[Path]:
    """Folders that a container must see: the run's, the current one, and those that the config names."""
    named = [
        config.data.tokenizer,
        config.checkpoint.initial,
        config.checkpoint.folder,
        *(source.corpus for source in config.data.sources),
    ]
    local = (Path(name).absolute() for name in named if name and "://" not in name)
    return sorted({run_dir, Path.cwd(), *(path if path.is_dir() else path.parent for path in local)})
