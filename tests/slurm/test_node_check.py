"""The check of nodes before a run names the faulty ones, and why."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from slurm.cluster import Cluster, until
from slurm.submitted import Submitted

from triplane.slurm.node_check import Facts, _rounds, faulty_nodes

SOUND = Facts(
    node="n1",
    local_rank=0,
    code="triplane 1 torch 2",
    clock_s=0.0,
    disk_gib=9.0,
    temporary_gib=9.0,
    shared_memory_gib=9.0,
    device="H100",
    device_gib=79.2,
    device_used_gib=1.5,
    bandwidth_gib_s=10.0,
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"code": "triplane 1 torch 3"}, "runs triplane 1 torch 3, others run triplane 1 torch 2"),
        ({"clock_s": -2.0}, "clock is off by -2.0 s"),
        ({"disk_gib": 0.5}, "run folder: 0.500 GiB free, less than 1.0"),
        ({"shared_memory_gib": 0.0625}, "/dev/shm: 0.062 GiB free, less than 0.125"),
        ({"device_used_gib": 4.0}, "H100 0 is in use: 4.0 of 79.2 GiB"),
        ({"device_gib": 9.8, "device_used_gib": 2.1}, "H100 0 is in use: 2.1 of 9.8 GiB"),
        ({"device": "CPU"}, "has CPU, others have H100"),
        ({"bandwidth_gib_s": 4.0}, "all-reduce at 4 GiB/s, others at 10"),
    ],
)
def test_a_faulty_node_is_named(change: dict, problem: str) -> None:
    sound = [replace(SOUND, node=f"n{number}") for number in (1, 2, 3)]
    assert faulty_nodes(sound) == {}
    faulty = replace(SOUND, node="n4", **change)
    assert faulty_nodes([*sound, faulty, faulty]) == {"n4": [problem]}


def test_a_context_on_a_small_gpu_is_no_use_by_others() -> None:
    assert faulty_nodes([replace(SOUND, device_gib=9.8, device_used_gib=0.6)]) == {}


def test_of_two_nodes_with_a_slow_link_neither_is_named() -> None:
    assert faulty_nodes([SOUND, replace(SOUND, node="n2", bandwidth_gib_s=0.1)]) == {}


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 8])
def test_every_node_meets_every_other_once(nodes: int) -> None:
    rounds = list(_rounds(nodes))
    for pairs in rounds:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met)) >= nodes - 1 or nodes == 1
    everything = sorted(pair for pairs in rounds for pair in pairs)
    assert everything == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]


def test_a_slow_link_is_found(cluster: Cluster, tmp_path: Path) -> None:
    slow = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "80mbit", "burst", "64kb", "latency", "200ms"]
    cluster.run_on("n3", *slow)
    bad = tmp_path / "bad"
    check = [sys.executable, "-m", "triplane", "check-nodes", tmp_path, "--bad-nodes", bad]
    result = cluster.run("srun", "--nodes=4", "--ntasks-per-node=1", "--time=5", *check)
    cluster.run_on("n3", "tc", "qdisc", "del", "dev", "eth0", "root")
    assert bad.read_text() == "n3\n", result.stdout + result.stderr
    assert result.returncode == 3
    assert "faulty nodes: n3" in result.stdout


def test_a_job_that_too_few_nodes_are_left_for_ends_and_names_them(cluster: Cluster, folder: Path) -> None:
    cluster.run_on("n3", "mount", "-o", "remount,size=64m", "/dev/shm")
    run = Submitted(cluster, folder)
    run.queue("submit", "long.toml", "parallel.tp=1", "--partition", "gpu", "--nodes", 2, "--ranks-per-node", 1)
    until(lambda: run.state == "FAILED", "the job ends")
    cluster.run_on("n3", "mount", "-o", "remount,size=256m", "/dev/shm")
    assert "failed the check: n3; without them partition gpu has 1 of the 2 nodes that the run requires" in run.said
    assert not run.events()
