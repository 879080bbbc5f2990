"""Ranks killed by SIGKILL in each phase of a save: the checkpoint before it stands, and nothing else stays."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from triplane.checkpoint import folder as folder_module
from triplane.checkpoint import store as store_module
from triplane.checkpoint import tensors
from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.folder import latest
from triplane.checkpoint.location import writing
from triplane.checkpoint.manifest import Manifest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.launcher.forked import RanksFailedError, run_ranks
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment

LAYOUT, RANKS = ParallelConfig(), 2
ELEMENTS = 10_000


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _half(path: Path) -> Iterator[BinaryIO]:
    with writing(path) as file:
        file.write(bytes(ELEMENTS * 2))
        file.flush()
        _die()
        yield file


def _after(action: Callable[..., Any]) -> Callable[..., None]:
    def act_and_die(*arguments: Any) -> None:
        action(*arguments)
        _die()

    return act_and_die


def _delete_one_and_die(folder: Path) -> None:
    sorted(folder.iterdir())[0].unlink()
    _die()


PHASES: dict[str, tuple[int, Any, str, Any]] = {
    "before the folder": (0, store_module, "begin", _die),
    "in a file": (1, tensors, "writing", _half),
    "before a file is on the disk": (1, os, "fsync", _die),
    "before the manifest": (0, Manifest, "to_json", _die),
    "after the manifest": (0, folder_module, "write_manifest", _after(folder_module.write_manifest)),
    "before the rename": (0, Path, "rename", _die),
    "after the rename": (0, store_module, "commit", _after(store_module.commit)),
    "in the deletion of an old one": (0, shutil, "rmtree", _delete_one_and_die),
}
STANDS = ("after the rename", "in the deletion of an old one")


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_save_leaves_the_one_before(phase: str, tmp_path: Path) -> None:
    run_ranks(LAYOUT, RANKS, _save, tmp_path, 1)
    with pytest.raises(RanksFailedError, match=r"exit code -9"):
        run_ranks(LAYOUT, RANKS, _save, tmp_path, 2, *PHASES[phase])
    newest = latest(tmp_path)
    assert newest == tmp_path / ("step_2" if phase in STANDS else "step_1")
    checkpoint = Checkpoint(newest)
    checkpoint.verify()
    assert checkpoint.tensor("weight/w").eq(checkpoint.state["step"]).all()
    run_ranks(LAYOUT, RANKS, _save, tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


def _save(mesh: Mesh, folder: Path, step: int, victim: int = -1, *planted: Any) -> None:
    if mesh.rank == victim:
        setattr(*planted)
    data = torch.full((ELEMENTS,), float(step))
    fragment = Fragment("weight", "w", torch.Size((ELEMENTS * RANKS,)), (ELEMENTS * mesh.rank,), data, primary=True)
    store = CheckpointStore(folder, CheckpointConfig(keep_last=1))
    store.save(step, [fragment], {"step": step})
    store.ended(wait=True)
