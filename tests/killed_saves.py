"""Saves by two ranks, one of which may be killed in a phase of its save."""

import pytest
import torch
from save_phases import PHASES, plant
from small_models import state_after

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.folder import latest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore, Save
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.storage.location import Location, entries, location

LAYOUT, RANKS = ParallelConfig(), 2
_ELEMENTS = 10_000


def save(mesh: Mesh, folder: str, step: int, phase: str | None = None, phases: dict = PHASES) -> Save:
    """Saves a tensor that is full of `step`; a rank dies in `phase`."""
    if phase and mesh.rank == phases[phase][0]:
        plant(phase, lambda: True, phases)
    fragment = Fragment(
        kind="weight",
        name="w",
        shape=torch.Size((_ELEMENTS * RANKS,)),
        offsets=(_ELEMENTS * mesh.rank,),
        data=torch.full((_ELEMENTS,), float(step)),
        primary=True,
    )
    store = CheckpointStore(location(folder), CheckpointConfig(keep_last=1))
    store.save(step, [fragment], state_after(step))
    (saved,) = store.ended(wait=True)
    return saved


def kill_a_save(folder: Location, *, phase: str, phases: dict, committed: bool) -> None:
    """Asserts that a kill leaves the checkpoint before, or the new one if `committed`; the next save removes it."""
    run_ranks(LAYOUT, RANKS, save, str(folder), 1)
    with pytest.raises(RanksFailedError, match=r"exit code -9"):
        run_ranks(LAYOUT, RANKS, save, str(folder), 2, phase, phases)
    newest = latest(folder)
    assert newest == folder / ("step_2" if committed else "step_1")
    checkpoint = Checkpoint(newest)
    checkpoint.verify()
    assert checkpoint.tensor("weight/w").eq(checkpoint.state["step"]).all()
    run_ranks(LAYOUT, RANKS, save, str(folder), 3)
    assert list(entries(folder)) == ["step_3"]
