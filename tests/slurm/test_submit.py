"""Mistakes in a submission are reported before anything is queued, and leave nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster

from triplane.slurm.client import limit_s
from triplane.storage.errors import LaunchError

NODES = ["--nodes", "2", "--ranks-per-node", "2"]

MISTAKES = {
    "partition": ([*NODES, "--partition", "fast"], "--partition fast: there is none of this name; there are main, "),
    "time": ([*NODES, "--time", "soon"], "--time soon: not a time of Slurm's"),
    "too short": (
        [*NODES, "--time", "1"],
        "the time limit, 1 min, is too short for one checkpoint: 60 s to start and 61 s for a step and a save at the "
        "end; give --time 3 or more",
    ),
    "too long": ([*NODES, "--partition", "gpu", "--time", "1-0"], "--time 1-0: partition gpu allows 30 min at most"),
    "layout": (["--nodes", "2", "--ranks-per-node", "1", "parallel.tp=4"], "= 4 does not divide 2 ranks"),
    "batch": (
        ["--nodes", "1-3", "--ranks-per-node", "2", "training.eval_sequences=24"],
        "global_batch_size (8) is not a multiple of dp (3) x",
    ),
    "nodes": (["--nodes", "2-1"], "--nodes 2-1: give a number, or a smallest and a largest one"),
    "too many nodes": (["--nodes", "8", "--ranks-per-node", "1"], "--nodes 8: partition main has 4"),
    "ranks": (["--nodes", "2"], "the nodes of partition main have no GPUs: give --ranks-per-node"),
    "too many ranks": (
        ["--nodes", "1", "--ranks-per-node", "16", "training.global_batch_size=16"],
        "a node of partition main has 0 GPUs and 8 CPUs",
    ),
    "container": ([*NODES, "--container", "image"], "--container image: this Slurm has no pyxis"),
    "closed": ([*NODES, "--partition", "closed"], "sbatch: error: Batch job submission failed: Required partition not"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_line_and_nothing_is_left(name: str, cluster: Cluster, folder: Path) -> None:
    arguments, message = MISTAKES[name]
    result = cluster.run(sys.executable, "-m", "triplane", "submit", "long.toml", *arguments, cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "run").exists()
    assert cluster.output("squeue", "--noheader", "--format=%i") == ""


def test_without_slurm_a_job_can_only_be_shown(folder: Path) -> None:
    command = [sys.executable, "-m", "triplane", "submit", "long.toml", *NODES]
    environment = {**os.environ, "PATH": ""}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "triplane: no Slurm here: sbatch is not on the PATH" in result.stderr
    assert not (folder / "run").exists()


def test_a_dry_run_needs_no_controller(folder: Path) -> None:
    for name in ("sbatch", "scontrol"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho 'fatal: Could not establish a configuration source' >&2; exit 1\n")
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "triplane", "submit", "long.toml", *NODES]
    for flags, code, told in ([], 2, "scontrol: "), (["--dry-run"], 0, "no Slurm here"):
        done = subprocess.run(
            [*command, *flags], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code and told in done.stderr, done.stderr
    assert "#SBATCH" in done.stdout


def test_a_dry_run_shows_the_script_with_what_the_nodes_have(cluster: Cluster, folder: Path) -> None:
    asked = ["--nodes", "2", "--partition", "gpu", "--account", "me", "--chain", "3", "--dry-run"]
    result = cluster.run(sys.executable, "-m", "triplane", "submit", "long.toml", *asked, cwd=folder)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for option in ("partition=gpu", "account=me", "array=1-3%1", "gpus-per-node=2", "signal=B:USR1@61"):
        assert f"#SBATCH --{option}" in lines
    assert "srun_options=(--ntasks-per-node=2 --cpus-per-task=4)" in lines
    assert "{{" not in result.stdout
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:30", 7230),
        ("1-12", 129_600),
        ("1-0:30", 88_200),
        ("0-0:0:5", 5),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
        ("0", float("inf")),
    ],
)
def test_times_are_read_as_slurm_writes_them(text: str, seconds: float) -> None:
    assert limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1.5", "-5", "1-", "1h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="not a time"):
        limit_s(text)
