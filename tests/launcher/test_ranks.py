"""Where a process finds its place: torchrun's and Slurm's variables."""

import stat
from pathlib import Path

import pytest

from triplane.launcher.errors import LaunchError
from triplane.launcher.ranks import Rank, current_rank, slurm_rendezvous


def test_torchrun_tells_the_rank() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    environment["LOCAL_WORLD_SIZE"] = "4"
    assert current_rank(environment) == Rank(5, 8, 1, 4)


def test_torchrun_is_not_let_start_ranks_again_that_would_wait_for_ever() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert current_rank({**environment, "TORCHELASTIC_MAX_RESTARTS": "0"}) == Rank(0, 2, 0)
    with pytest.raises(LaunchError, match=r"--max-restarts 3: .* set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        current_rank({**environment, "TORCHELASTIC_MAX_RESTARTS": "3"})


def test_a_slurm_task_is_a_rank_but_a_batch_script_is_not() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert current_rank(batch) is None
    assert current_rank(
        {
            **batch,
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        }
    ) == Rank(3, 4, 1, 2)


def test_a_plain_shell_is_no_rank() -> None:
    assert current_rank({"RANK": "0"}) is None


def test_the_tasks_of_a_step_agree_on_a_meeting_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n" || { echo "bad list" >&2; exit 1; }\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "41007"}
    assert slurm_rendezvous(environment) == {"MASTER_ADDR": "n1", "MASTER_PORT": "21007"}
    with pytest.raises(LaunchError, match="bad list"):
        slurm_rendezvous({**environment, "SLURM_STEP_NODELIST": "?"})
