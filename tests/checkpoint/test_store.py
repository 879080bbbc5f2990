"""Checkpoints are whole or absent: damage is named, a full disk leaves what was there."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from resharding import LAYOUTS, train

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.errors import CheckpointError, DamagedError
from triplane.checkpoint.manifest import MANIFEST, checkpoints, latest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.launcher.forked import run_ranks
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.training.proof import proof_model

LAYOUT, RANKS = LAYOUTS["zero1 dp2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    run_ranks(LAYOUT, RANKS, train, proof_model(), LAYOUT, range(2), None, folder)
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
    assert len(shapes) == 3 * (config.n_layers * 9 + 3)
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
    other = Fragment("weight", "embedding.weight", torch.Size((9, 9)), (0, 0), weight, primary=False)
    with pytest.raises(CheckpointError, match=r"has shape \[61, 32\], but this model needs \[9, 9\]"):
        Checkpoint(checkpoint).fill([other])


def test_what_a_killed_save_left_is_ignored_and_removed(checkpoint: Path) -> None:
    torn = checkpoint.parent / ".step_9.tmp"
    torn.mkdir()
    (torn / "rank_0.safetensors").write_bytes(b"half")
    assert latest(checkpoint.parent) == checkpoint
    run_ranks(LAYOUT, RANKS, _save, checkpoint.parent, 3)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step_2", "step_3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("elements", [28_000, 200_000])
def test_a_full_disk_fails_the_save_and_leaves_the_rest(elements: int, small_disk: Path) -> None:
    """Too large by itself, or only together with the other rank's file."""
    run_ranks(LAYOUT, RANKS, _save, small_disk, 1)
    message = run_ranks(LAYOUT, RANKS, _fail_to_save, small_disk, 2, elements)
    assert all("cannot write" in text and "earlier checkpoints are untouched" in text for text in message)
    assert checkpoints(small_disk) == [small_disk / "step_1"]
    assert [path.name for path in small_disk.iterdir()] == ["step_1"]
    Checkpoint(small_disk / "step_1").verify()


def _save(mesh: Mesh, folder: Path, step: int, elements: int = 10_000) -> None:
    data = torch.full((elements,), float(step))
    shape = torch.Size((elements * mesh.world_size,))
    fragment = Fragment("weight", "w", shape, (elements * mesh.rank,), data, primary=True)
    CheckpointStore(folder, CheckpointConfig(keep_last=2)).save(step, [fragment], {})


def _fail_to_save(mesh: Mesh, folder: Path, step: int, elements: int) -> str:
    try:
        _save(mesh, folder, step, elements)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("the save went through")
