"""The lines of slurm/README.md for those who write their own scripts."""

import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster

TRAIN = "-m triplane train long.toml parallel.tp=1 training.steps=3 training.eval_sequences=4"
TORCHRUN = (
    f"{sys.executable} -m torch.distributed.run --nnodes $SLURM_NNODES --node-rank $SLURM_NODEID --nproc-per-node 1 "
    f"--master-addr $(scontrol show hostnames $SLURM_STEP_NODELIST | head -1) --master-port 29500 {TRAIN}"
)


@pytest.mark.parametrize("line", [f"{sys.executable} {TRAIN}", TORCHRUN], ids=["srun", "torchrun"])
def test_ranks_on_two_nodes_find_each_other(line: str, cluster: Cluster, folder: Path) -> None:
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--time=5"]
    result = cluster.run(*srun, "bash", "-c", f"exec {line}", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("dp 2, zero 1, fp32 on cpu") == 1
    assert "step 3/3" in result.stdout
    assert (folder / "run/DONE").read_text() == "3\n"
