"""`triplane submit`: checks a run, then queues a job with Slurm."""

import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from triplane.config.checks import check
from triplane.config.load import load_config
from triplane.plan.gate import examine
from triplane.slurm import client as slurm
from triplane.slurm.batch_script import Order, Request, batch_script
from triplane.slurm.jobs import active_job
from triplane.slurm.snapshot import JOB_ID, SCRIPT, next_submission, take_snapshot
from triplane.storage.errors import ConfigError, LaunchError
from triplane.training.config import RunConfig
from triplane.training.run_folder import RunFolder

_START_S = 60
"""Time to the first step: imports, the check of the nodes, reading the checkpoint."""


def submit(path: Path, overrides: list[str], request: Request, *, dry_run: bool) -> None:
    """Queues a run and prints the job's id; with `dry_run` prints the batch script."""
    config = load_config(path, overrides)
    partition = None
    if slurm.is_here() and not (dry_run and slurm.is_out_of_reach()):
        partition = slurm.partition(request.partition)
    elif not dry_run:
        raise LaunchError("no Slurm here: sbatch is not on the PATH; run this where jobs are submitted, or --dry-run")
    fewest, most = _nodes(request.nodes)
    ranks_per_node = request.ranks_per_node or _ranks_per_node(config, partition, fewest=fewest, most=most)
    order = Order(
        config=config,
        request=request,
        fewest_nodes=fewest,
        most_nodes=most,
        ranks_per_node=ranks_per_node,
        partition=partition,
    )
    notes = _check(order)
    submission = next_submission(order.run_dir)
    script = batch_script(order, submission)
    if dry_run:
        print(script, end="")
        _say(notes)
        if partition is None:
            print("triplane: no Slurm here: partition, nodes and time limit are not checked", file=sys.stderr)
        return
    job = _queue(order, submission, script)
    _say(notes)
    where = f"{request.nodes} x {ranks_per_node} ranks by {submission / SCRIPT}"
    print(f"job {job}: {config.run_dir} on {where}; `triplane status {config.run_dir}` shows it")


def _say(notes: list[str]) -> None:
    for note in notes:
        print(f"triplane: {note}", file=sys.stderr)


def _queue(order: Order, submission: Path, script: str) -> str:
    """Queues the job and returns its id; leaves no files behind if Slurm refuses it."""
    logs = RunFolder(order.run_dir).logs  # Slurm does not create the folder of its output
    made = [_first_missing(submission), _first_missing(logs)]
    try:
        submission.mkdir(parents=True)
        logs.mkdir(exist_ok=True)
        take_snapshot(submission, order.config)
        (submission / SCRIPT).write_text(script)
        job = slurm.submit(submission / SCRIPT)
    except BaseException:
        for path in filter(None, made):
            shutil.rmtree(path, ignore_errors=True)  # the second may be in the first
        raise
    (submission / JOB_ID).write_text(f"{job}\n")
    return job


def _first_missing(folder: Path) -> Path | None:
    """Returns the topmost folder that must be created for this one."""
    return next((path for path in reversed([folder, *folder.parents]) if not path.exists()), None)


def _nodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise LaunchError(f"--nodes {text}: give a number, or a smallest and a largest one such as 2-4")
    return fewest, most


def _ranks_per_node(config: RunConfig, partition: slurm.Partition | None, *, fewest: int, most: int) -> int:
    if partition and partition.gpus_per_node:
        return partition.gpus_per_node
    one, dp = config.parallel.ranks_of_one, config.parallel.dp
    if dp != "auto" and fewest == most and one * dp % fewest == 0:
        return one * dp // fewest
    where = f"the nodes of partition {partition.name} have no GPUs" if partition else "the nodes are unknown here"
    raise LaunchError(f"{where}: give --ranks-per-node, or a parallel.dp that spreads evenly over --nodes")


def _check(order: Order) -> list[str]:
    """Returns notes for the user; raises ConfigError with all problems, one line each."""
    request, ranks = order.request, order.fewest_nodes * order.ranks_per_node
    gate = examine(
        order.config,
        ranks,
        allow_data_change=request.allow_data_change,
        allow_fresh_start=request.allow_fresh_start,
    )
    found = dict.fromkeys(gate.problems)
    for nodes in range(order.fewest_nodes + 1, order.most_nodes + 1):
        found |= dict.fromkeys(check(order.config, nodes * order.ranks_per_node))
    found |= dict.fromkeys(_job_problems(order))
    if found:
        raise ConfigError("\n".join(found))
    return list(gate.notes())


def _job_problems(order: Order) -> Iterator[str]:
    request, run_dir, steps = order.request, order.config.run_dir, order.config.training.steps
    asked_s = slurm.limit_s(request.time) if request.time else None
    if RunFolder(order.run_dir).steps_done() >= steps:
        yield f"{run_dir}: all {steps} steps are done; raise training.steps to continue"
    if order.partition is None:
        return
    name = order.partition.name
    if job := active_job(order.run_dir):
        yield f"{run_dir}: job {job.id} is {job.state}; `triplane cancel {run_dir}` first"
    if order.fewest_nodes > order.partition.nodes:
        yield f"--nodes {request.nodes}: partition {name} has {order.partition.nodes}"
    if order.ranks_per_node > (order.partition.gpus_per_node or order.partition.cpus_per_node):
        has = f"{order.partition.gpus_per_node} GPUs and {order.partition.cpus_per_node} CPUs"
        yield f"--ranks-per-node {order.ranks_per_node}: a node of partition {name} has {has}"
    if request.container and not slurm.has_containers():
        yield f"--container {request.container}: this Slurm has no pyxis; install it, or omit --container"
    limit_s = order.partition.default_s if asked_s is None else asked_s
    if limit_s > order.partition.max_s:
        yield f"--time {request.time}: partition {name} allows {_minutes(order.partition.max_s)} min at most"
    if limit_s < _START_S + order.warning_s:
        yield (
            f"the time limit, {_minutes(limit_s)} min, is too short for one checkpoint: {_START_S} s to start and "
            f"{order.warning_s} s for a step and a save at the end; give --time {_minutes(_START_S + order.warning_s)} "
            f"or more"
        )


def _minutes(seconds: float) -> int:
    return math.ceil(seconds / 60)
