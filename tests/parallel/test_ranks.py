"""Where a process finds its place: torchrun's and Slurm's variables."""

import stat
from pathlib import Path

import pytest

from triplane.parallel.devices import threads
from triplane.parallel.ranks import Rank, current_rank, rendezvous
from triplane.storage.errors import LaunchError


def test_torchrun_tells_the_rank() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    environment["LOCAL_WORLD_SIZE"] = "4"
    assert current_rank(environment) == Rank(rank=5, world_size=8, local_rank=1, local_size=4)


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
    ) == Rank(rank=3, world_size=4, local_rank=1, local_size=2, shown_apart=True)


def test_a_plain_shell_is_no_rank() -> None:
    assert current_rank({"RANK": "0"}) is None
    assert current_rank({"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize("given", [{"RANK": "abc"}, {"RANK": ""}, {"WORLD_SIZE": "2"}, {"RANK": "1"}])
def test_a_rank_that_no_launcher_started_is_named(given: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"^(RANK|WORLD_SIZE) is '.*', but no launcher started ranks: unset it"):
        current_rank(given)


def test_the_tasks_of_a_step_agree_on_a_meeting_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n" || { echo "bad list" >&2; exit 1; }\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "41007"}
    assert rendezvous(environment) == {"MASTER_ADDR": "n1", "MASTER_PORT": "21007"}
    with pytest.raises(LaunchError, match="bad list"):
        rendezvous({**environment, "SLURM_STEP_NODELIST": "?"})


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("environment", "change", "problem"),
    [
        (TORCHRUN, {"RANK": "abc"}, "RANK is 'abc'; set a whole number"),
        (TORCHRUN, {"RANK": "-1"}, "RANK is '-1'; set a whole number"),
        (TORCHRUN, {"RANK": "4"}, "RANK is 4; set a number from 0 to 3"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE is 0; set 1 or more"),
        (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2; set a number from 0 to 1"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''; set a whole number"),
        (TORCHRUN, {"TORCHELASTIC_MAX_RESTARTS": "x"}, "TORCHELASTIC_MAX_RESTARTS is 'x'; set a whole number"),
        (SLURM, {"SLURM_PROCID": "7"}, "SLURM_PROCID is 7; set a number from 0 to 3"),
        (SLURM, {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": None}, "SLURM_STEP_TASKS_PER_NODE is ''; set a whole number"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(
    environment: dict[str, str], change: dict[str, str | None], problem: str
) -> None:
    changed = {name: value for name, value in (environment | change).items() if value is not None}
    with pytest.raises(LaunchError) as raised:
        current_rank(changed)
    assert str(raised.value).startswith(problem)
    assert "\n" not in str(raised.value)


def test_what_is_missing_of_a_meeting_point_is_named_or_found() -> None:
    with pytest.raises(LaunchError, match=r"^MASTER_PORT not set; set MASTER_ADDR and MASTER_PORT for every rank$"):
        rendezvous({"MASTER_ADDR": "a"})
    with pytest.raises(LaunchError, match=r"^MASTER_PORT is 70000; set a number from 1 to 65535$"):
        rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "70000"})
    job = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "41007"}
    assert rendezvous({"MASTER_ADDR": "a", **job}) == {"MASTER_PORT": "21007"}
    assert rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "1", **job}) == {}


@pytest.mark.parametrize(("given", "expected"), [("4", 4), ("4,2", 4), (None, None), ("", None)])
def test_threads_are_those_of_the_outer_level(given: str | None, expected: int | None) -> None:
    assert threads({} if given is None else {"OMP_NUM_THREADS": given}) == expected
    with pytest.raises(LaunchError, match=r"^OMP_NUM_THREADS is 'four'; set a whole number$"):
        threads({"OMP_NUM_THREADS": "four"})
