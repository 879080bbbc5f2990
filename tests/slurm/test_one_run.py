"""One run on a real Slurm through everything that befalls it, against the same run on this machine without a break."""

import json
import re
from pathlib import Path

import pytest
from runs import small_run
from slurm.cluster import NODES, Cluster, until
from slurm.submitted import Submitted, ranks_on
from small_corpora import Prepared

from triplane.launcher.run import train_on
from triplane.prove.forked import run_ranks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loss_is_that_of_a_run_without_a_break(cluster: Cluster, folder: Path, prepared: Prepared) -> None:
    run = Submitted(cluster, folder)
    cluster.run_on("n1", "mount", "-o", "remount,size=64m", "/dev/shm")
    faults = "faults.hang_timeout_s=8"
    run.queue("submit", "long.toml", faults, "--nodes", "1-2", "--ranks-per-node", 2, "--time", 30)
    job = run.job

    until(lambda: run.state == "PENDING" and "failed the check" in run.said, "a bad node is found")
    until(lambda: cluster.field(job, "ExcNodeList") == "n1", "the bad node is excluded")
    assert "n1" in run.said and "/dev/shm: 0.06" in run.said
    run.goes_on()
    run.trains()
    assert run.events()[0]["details"]["layout"] == "tp 2 x dp 2, zero 1"
    assert "n1" not in run.nodes and len(run.nodes) == 2

    run.nears_its_limit()
    run.goes_on()
    assert run.events("signal")[-1]["details"] == {"name": "stop file"}
    saved = run.events("save")[-1]["step"]
    run.trains()
    assert run.events("resume")[-1]["step"] == saved

    progress = len(run.events("save"))
    until(lambda: len(run.events("save")) > progress, "a checkpoint")
    struck = run.nodes[1]
    cluster.run_on(struck, "kill", "-KILL", ranks_on(cluster, struck)[1])
    run.goes_on()
    assert re.search(rf"rank [23] on {struck} failed first, in step \d+.*: killed: .*; crash 1 of 3", run.said), (
        run.said
    )
    (killed,) = run.events("failure")
    assert killed["details"]["host"] == struck and killed["step"] == run.events("save")[-1]["step"]
    run.trains()

    urgent = cluster.output(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=4", "--exclusive", "-o/dev/null", "--wrap=:"
    )
    until(lambda: cluster.field(urgent, "JobState") == "COMPLETED", "the urgent job")
    run.goes_on()
    assert len(run.events("signal")) == 2
    run.trains()

    victim, kept = run.nodes
    (spare,) = {*NODES} - {"n1", victim, kept}
    cluster.output("scontrol", "update", f"NodeName={spare}", "State=DRAIN", "Reason=test")
    cluster.kill_node(victim)
    until(lambda: run.state == "PENDING", "the job of the dead node is requeued")
    run.goes_on()
    run.trains()
    assert run.nodes == [kept]
    assert run.events("resume")[-1]["details"]["layout"] == "tp 2, zero 1"

    cluster.run_on(kept, "kill", "-STOP", ranks_on(cluster, kept)[1])
    run.goes_on()
    assert "task 0: Exited with exit code 75" in run.said
    assert run.said.count("crash 1 of 3") == 2
    assert re.search(r"failed first, in step \d+.*: hang: no progress for .*; crash 1 of 3", run.said), run.said
    assert "hang in step" in (folder / f"run/logs/rank_0.job_{job}.5.log").read_text()
    run.trains()
    assert f"rank_0.job_{job}.6.log\n" in run.triplane("logs", "run", "--rank", 0).stdout

    assert run.triplane("cancel", "run").returncode == 0
    run.stays("CANCELLED")
    assert f"job {job} CANCELLED" in run.triplane("status", ".").stdout
    assert cluster.field(job, "Restarts") == "6"

    cluster.run_on("n1", "mount", "-o", "remount,size=256m", "/dev/shm")
    steps = run.step + 10
    run.queue("submit", "long.toml", f"training.steps={steps}", "--nodes", 1, "--ranks-per-node", 2, "--time", 30)
    assert run.job != job
    run.stays("COMPLETED")
    assert (folder / "run/DONE").read_text() == f"{steps}\n"
    assert f"{steps}/{steps}" in run.triplane("status", ".").stdout
    assert "is done" in run.triplane("resume", "run").stderr

    whole = small_run(
        prepared,
        folder / "whole",
        parallel={"tp": 2, "dp": 2},
        schedule={"kind": "constant"},
        training={"steps": steps, "eval_every_steps": 1_000_000},
        checkpoint={"every_steps": 1_000_000},
    )
    run_ranks(whole.parallel, 4, train_on, whole)
    lines = map(json.loads, (folder / "whole/metrics.jsonl").read_text().splitlines())
    expected = {line["step"]: line["loss"] for line in lines if "loss" in line}
    losses = [(line["step"], line["loss"]) for line in run.metrics() if "loss" in line]
    assert [step for step, _ in losses] == [*range(1, steps + 1)]
    # On one node the sums are made in another order.
    assert dict(losses) == pytest.approx(expected, rel=1e-3)
    one_node = run.events("resume")[-3]["step"]
    assert losses[:one_node] == [*expected.items()][:one_node]

    cluster.start_node(victim)
    cluster.output("scontrol", "update", f"NodeName={spare}", "State=RESUME")
