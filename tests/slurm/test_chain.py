"""A chain of jobs where processes are tracked by cgroups, as clusters usually do."""

from pathlib import Path

import pytest
from slurm.cluster import Cluster, until
from slurm.submitted import Submitted


@pytest.mark.slow
@pytest.mark.skipif(not Path("/sys/fs/cgroup/freezer").is_dir(), reason="no cgroup v1 with a freezer here")
def test_a_warned_job_leaves_the_run_to_the_next_and_a_cancelled_chain_ends(
    has_slurm: None, folder: Path, tmp_path: Path
) -> None:
    with Cluster(tmp_path / "cluster", "cgroup") as cluster:
        run = Submitted(cluster, folder)
        run.queue("submit", "long.toml", "parallel.tp=1", "--nodes", 1, "--ranks-per-node", 1, "--chain", 3)
        array = run.job
        run.job = f"{array}_1"
        run.trains()
        refused = run.triplane("submit", "long.toml", "--nodes", 1, "--ranks-per-node", 2)
        assert f"run: job {array} is RUNNING" in refused.stderr
        run.warn()
        run.job = f"{array}_2"
        run.trains()
        assert "the ranks save and leave" in run.said
        assert run.events("resume")[0]["step"] == run.events("signal")[0]["step"]

        assert run.triplane("cancel", "run").returncode == 0
        run.stays("CANCELLED")
        assert run.events()[-1]["event"] == "stopped"  # a cancelled run saves too
        assert run.events("signal")[-1]["details"] == {"name": "SIGTERM"}
        assert cluster.output("squeue", "--noheader") == ""

        run.queue("resume", "run")
        run.job += "_1"
        run.trains()
        run.triplane("cancel", "run")
        until(lambda: cluster.output("squeue", "--noheader") == "", "the end")
