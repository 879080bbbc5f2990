"""Writes checkpoints of a run so that one is whole or absent, and keeps the newest.

Every rank writes its fragments into a temporary folder; when all have, rank 0 writes the manifest and
renames the folder. A kill at any moment leaves the earlier checkpoints as they were.
"""

import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import save_file

from triplane.checkpoint.agreement import on_rank_0
from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.manifest import MANIFEST, PREFIX, Box, Manifest, checkpoints
from triplane.data.files import sync
from triplane.parallel.placement import Fragment


class CheckpointStore:
    """The checkpoints of one run. `save` is collective: every rank calls it."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = folder
        self.config = config

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> Path:
        """Writes `step_<step>` from the fragments of all ranks; returns its path."""
        final = self.folder / f"{PREFIX}{step}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self._write(final, temporary, fragments, state)
        except OSError as error:
            raise CheckpointError(_explain(error, temporary)) from error
        return final

    def _write(self, final: Path, temporary: Path, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        on_rank_0(lambda: _make_empty(temporary))
        file = f"rank_{dist.get_rank()}.safetensors"
        outcome: tuple[str, list[Box], int] = ("", [], 0)
        try:
            outcome = ("", *_write(temporary / file, [f for f in fragments if f.primary]))
        except (OSError, SafetensorError) as error:
            outcome = (_explain(error, temporary), [], 0)
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
        errors = [error for error, _, _ in outcomes if error]
        if errors:
            on_rank_0(lambda: shutil.rmtree(temporary))
            raise CheckpointError(errors[0])
        boxes = [box for _, boxes, _ in outcomes for box in boxes]
        sizes = {f"rank_{rank}.safetensors": size for rank, (_, _, size) in enumerate(outcomes) if size}
        on_rank_0(lambda: self._commit(temporary, final, Manifest(state, boxes, sizes)))

    def _commit(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        with open(temporary / MANIFEST, "w") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync(temporary)
        if final.exists():
            final.rename(self.folder / f".{final.name}.old")  # deleted below, once the new one stands
        temporary.rename(final)
        sync(self.folder)
        leftovers = self.folder.glob(f".{PREFIX}*")
        for old in [*checkpoints(self.folder)[: -self.config.keep_last], *leftovers]:
            shutil.rmtree(old)


def _make_empty(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write(path: Path, fragments: list[Fragment]) -> tuple[list[Box], int]:
    """Writes the fragments to one file; returns what is where, and the file's bytes."""
    if not fragments:
        return [], 0
    arrays, boxes = {}, []
    for fragment in fragments:
        array = fragment.data.cpu().numpy()
        box = Box(
            fragment.key,
            tuple(fragment.shape),
            fragment.offsets,
            array.shape,
            path.name,
            zlib.crc32(array.data),
        )
        arrays[box.entry] = array
        boxes.append(box)
    _check_space(path, sum(array.nbytes for array in arrays.values()))
    save_file(arrays, path)
    sync(path)
    return boxes, path.stat().st_size


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"{path} needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free")


def _explain(error: Exception, folder: Path) -> str:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return (
        f"cannot write {folder}: {error} ({free / 2**30:.2f} GiB free); earlier checkpoints are untouched; "
        f"make room or set another run_dir, then start again"
    )
