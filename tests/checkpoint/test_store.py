"""Checkpoints are whole or absent: damage is named, a full disk leaves what was there."""

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
from resharding import LAYOUTS
from small_models import state_after

from triplane.checkpoint import store as store_module
from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.folder import latest
from triplane.checkpoint.manifest import MANIFEST
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore, Save
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.prove.reference import proof_model
from triplane.prove.resharding import train_between
from triplane.storage.errors import CheckpointError, DamagedError

LAYOUT, RANKS = LAYOUTS["zero1 dp2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    train = partial(train_between, dtype=torch.float32, steps=range(2), save=folder)
    run_ranks(LAYOUT, RANKS, train, proof_model(), LAYOUT)
    return folder / "step_2"


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "step_2")
    return tmp_path / "step_2"


def test_each_byte_is_written_once(written: Path) -> None:
    """Two ranks write about half each; together weights and two moments in fp32."""
    config = proof_model()
    sizes = [path.stat().st_size for path in sorted(written.glob("*.safetensors"))]
    shapes = Checkpoint(written).shapes
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert len(shapes) == 3 * (config.n_layers * 12 + 3)
    assert 0 <= sum(sizes) - 4 * elements < 30_000  # headers
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_folder_without_a_manifest_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        Checkpoint(checkpoint)


def test_a_flipped_bit_is_found(checkpoint: Path) -> None:
    path = checkpoint / "rank_1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_1.safetensors: .* is damaged \(CRC-32"):
        Checkpoint(checkpoint).verify()


@pytest.mark.parametrize("position", range(0, 1200, 60))
def test_a_flipped_bit_of_a_header_is_found(position: int, checkpoint: Path) -> None:
    path = checkpoint / "rank_0.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"rank_0.safetensors: "):
        Checkpoint(checkpoint).verify()


def test_a_truncated_or_missing_file_is_found_at_once(checkpoint: Path) -> None:
    path = checkpoint / "rank_0.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError, match=f"{size - 1} bytes, expected {size}"):
        Checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint(checkpoint)


def test_a_changed_manifest_is_found(checkpoint: Path) -> None:
    outer = json.loads((checkpoint / MANIFEST).read_text())
    outer["body"] = outer["body"].replace('"state"', '"stata"')
    (checkpoint / MANIFEST).write_text(json.dumps(outer))
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        Checkpoint(checkpoint)


def test_another_models_checkpoint_is_refused(checkpoint: Path) -> None:
    weight = torch.empty(1, 1)
    other = Fragment(
        kind="weight", name="embedding.weight", shape=torch.Size((9, 9)), offsets=(0, 0), data=weight, primary=False
    )
    with pytest.raises(CheckpointError, match=r"has shape \[61, 32\], but this model needs \[9, 9\]"):
        Checkpoint(checkpoint).fill([other])


def test_what_a_killed_save_left_is_ignored_and_removed(checkpoint: Path) -> None:
    torn = checkpoint.parent / ".step_9.tmp"
    torn.mkdir()
    (torn / "rank_0.safetensors").write_bytes(b"half")
    assert latest(checkpoint.parent) == checkpoint
    run_ranks(LAYOUT, RANKS, _save, checkpoint.parent, 3)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step_2", "step_3"]


@pytest.mark.parametrize("elements", [28_000, 200_000])
def test_a_save_that_has_no_room_is_not_begun(elements: int, small_disk: Path) -> None:
    """One rank's file is too large by itself, or only together with the other's."""
    run_ranks(LAYOUT, RANKS, _save, small_disk, 1)
    for save in run_ranks(LAYOUT, RANKS, _save, small_disk, 2, elements):
        assert save.error.startswith(f"cannot write {small_disk}/step_2: {8 * elements:,} bytes needed, ")
        assert "earlier checkpoints are untouched; make room" in save.error
    assert [path.name for path in small_disk.iterdir()] == ["step_1"]


@pytest.mark.parametrize("before", ["write_tensors", "commit"])
def test_a_disk_that_fills_up_meanwhile_fails_the_save_and_leaves_the_rest(before: str, small_disk: Path) -> None:
    run_ranks(LAYOUT, RANKS, _save, small_disk, 1)
    for failed, repeated in run_ranks(LAYOUT, RANKS, _save_twice_while_the_disk_fills, small_disk, before):
        assert failed.error.startswith(f"cannot write {small_disk}/step_2: ") and "No space left" in failed.error
        assert repeated.error is None
    assert sorted(path.name for path in small_disk.iterdir()) == ["step_1", "step_3"]
    for path in small_disk.iterdir():
        Checkpoint(path).verify()


def _save_twice_while_the_disk_fills(mesh: Mesh, folder: Path, before: str) -> list[Save]:
    action, ballast = getattr(store_module, before), folder / "ballast"

    def fill_disk(*arguments: Any) -> Any:
        with open(ballast, "ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        return action(*arguments)

    setattr(store_module, before, fill_disk)
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2))
    store.save(2, [_fragment(mesh, 2)], state_after(2))
    saves = store.ended(wait=True)
    dist.barrier()
    ballast.unlink(missing_ok=True)
    setattr(store_module, before, action)
    store.save(3, [_fragment(mesh, 3)], state_after(3))
    return saves + store.ended(wait=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_waits_for_the_copy_alone(asynchronous: bool, tmp_path: Path) -> None:
    ranks = run_ranks(LAYOUT, RANKS, _save_twice_to_a_slow_disk, tmp_path, asynchronous)
    for returned_s, saves in ranks:
        assert [save.step for save in saves] == [1, 2]
        assert all(save.time_s > SLOW_S for save in saves)
        if asynchronous:
            assert returned_s[0] < SLOW_S / 2 < SLOW_S < returned_s[1]  # the second waits for the first
            assert saves[0].stall_s < SLOW_S / 2 < saves[1].stall_s
        else:
            assert all(took_s > SLOW_S for took_s in returned_s)
            assert all(save.stall_s == save.time_s for save in saves)
    for step in (1, 2):  # what was changed meanwhile is not in there
        assert Checkpoint(tmp_path / f"step_{step}").tensor("weight/w").eq(step).all()


SLOW_S = 0.6


def _save_twice_to_a_slow_disk(mesh: Mesh, folder: Path, asynchronous: bool) -> tuple[list[float], list[Save]]:
    if mesh.rank == 1:  # both wait for the slower
        sync = os.fsync
        os.fsync = lambda descriptor: sleep(SLOW_S / 2) or sync(descriptor)  # type: ignore[assignment]  # of the file, of its name
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2, asynchronous=asynchronous))
    fragment = _fragment(mesh, 0)
    took_s = []
    for step in (1, 2):
        fragment.data.fill_(step)
        start_s = perf_counter()
        store.save(step, [fragment], state_after(step))
        store.wait_until_copied()
        took_s.append(perf_counter() - start_s)
        fragment.data.fill_(-1)
    return took_s, store.ended(wait=True)


def test_a_programming_error_in_the_thread_reaches_the_loop(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="TypeError: Object of type PosixPath"):
        run_ranks(LAYOUT, 1, _save, tmp_path, 1, 10, {"state": tmp_path})


def _fragment(mesh: Mesh, step: int, elements: int = 10_000) -> Fragment:
    data = torch.full((elements,), float(step))
    shape = torch.Size((elements * mesh.world_size,))
    return Fragment(kind="weight", name="w", shape=shape, offsets=(elements * mesh.rank,), data=data, primary=True)


def _save(mesh: Mesh, folder: Path, step: int, elements: int = 10_000, state: dict | None = None) -> Save:
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2))
    store.save(step, [_fragment(mesh, step, elements)], state or state_after(step))
    (save,) = store.ended(wait=True)
    return save
