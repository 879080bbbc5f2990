"""Ranks killed by SIGKILL in each phase of a save: the checkpoint before it stands, and nothing else stays."""

from pathlib import Path

import pytest
import torch
from save_phases import PHASES, plant
from small_models import state_after

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.folder import latest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.prove.forked import RanksFailedError, run_ranks

LAYOUT, RANKS = ParallelConfig(), 2
ELEMENTS = 10_000

STANDS = ("after the rename", "in the deletion of an old one")


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_save_leaves_the_one_before(phase: str, tmp_path: Path) -> None:
    run_ranks(LAYOUT, RANKS, _save, tmp_path, 1)
    with pytest.raises(RanksFailedError, match=r"exit code -9"):
        run_ranks(LAYOUT, RANKS, _save, tmp_path, 2, phase)
    newest = latest(tmp_path)
    assert newest == tmp_path / ("step_2" if phase in STANDS else "step_1")
    checkpoint = Checkpoint(newest)
    checkpoint.verify()
    assert checkpoint.tensor("weight/w").eq(checkpoint.state["step"]).all()
    run_ranks(LAYOUT, RANKS, _save, tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


def _save(mesh: Mesh, folder: Path, step: int, phase: str | None = None) -> None:
    if phase and mesh.rank == PHASES[phase][0]:
        plant(phase, lambda: True)
    data = torch.full((ELEMENTS,), float(step))
    fragment = Fragment(
        kind="weight",
        name="w",
        shape=torch.Size((ELEMENTS * RANKS,)),
        offsets=(ELEMENTS * mesh.rank,),
        data=data,
        primary=True,
    )
    store = CheckpointStore(folder, CheckpointConfig(keep_last=1))
    store.save(step, [fragment], state_after(step))
    store.ended(wait=True)
