"""Reads any box of any tensor of a checkpoint, whatever layout wrote it; verifies every byte that it reads."""

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from triplane.checkpoint.manifest import MANIFEST, Box, read_manifest
from triplane.checkpoint.tensors import TensorFile
from triplane.checkpoint.tiling import tiles
from triplane.parallel.placement import Fragment
from triplane.storage.errors import CheckpointError, DamagedError
from triplane.storage.location import Location


class Checkpoint:
    """A checkpoint opened for reading; holds memory for the largest box read so far."""

    def __init__(self, folder: Location):
        self.folder = folder
        manifest = read_manifest(folder)
        self.state: dict[str, Any] = manifest.state
        self.file_bytes = manifest.file_bytes
        self._files: dict[str, TensorFile] = {}
        self._memory = torch.empty(0)
        self._boxes: dict[str, list[Box]] = defaultdict(list)
        for box in manifest.boxes:
            self._boxes[box.key].append(box)

    @property
    def bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(self.file_bytes.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the global tensors by key (`weight/blocks.0.attention.wq.weight`)."""
        return {key: boxes[0].shape for key, boxes in self._boxes.items()}

    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Copies the checkpoint's values into the fragments' memory."""
        wanted: dict[str, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            wanted[fragment.key].append(fragment)
        for key, targets in wanted.items():
            self._fill_tensor(key, targets)

    def tensor(self, key: str) -> Tensor:
        """Reads a whole tensor to the host."""
        shape = self.shapes.get(key)
        if shape is None:
            raise CheckpointError(f"{self.folder}: holds no {key}; it was written by another model")
        self._check_tiling(key)
        whole = torch.empty(shape)
        kind, _, name = key.partition("/")
        fragment = Fragment(
            kind=kind, name=name, shape=whole.shape, offsets=(0,) * whole.dim(), data=whole, primary=False
        )
        self.fill([fragment])
        return whole

    def verify(self) -> None:
        """Reads everything; raises if a tensor has a gap or is not listed, or a byte differs from what was written."""
        for key, boxes in self._boxes.items():
            self._check_tiling(key)
            for box in boxes:
                self._read(box)
        listed: dict[str, list[Box]] = defaultdict(list)
        for box in chain.from_iterable(self._boxes.values()):
            listed[box.file].append(box)
        for name in self.file_bytes:
            if name.endswith(".safetensors"):
                self._file(name).check_listed(listed[name])

    def _fill_tensor(self, key: str, targets: list[Fragment]) -> None:
        boxes = self._boxes.get(key)
        shape = tuple(targets[0].shape)
        if not boxes or boxes[0].shape != shape:
            name = key.partition("/")[2]
            if not boxes and f"weight/{name}" in self._boxes:
                raise CheckpointError(
                    f"{self.folder}: {key} is absent: another kind of optimizer wrote it; set the table "
                    f"[optimizer] to that, or start from the weights alone by checkpoint.initial in a new run_dir"
                )
            found = f"has shape {list(boxes[0].shape)}" if boxes else "is absent"
            raise CheckpointError(f"{self.folder}: {key} {found}, but this model needs {list(shape)}")
        self._check_tiling(key)
        for box in boxes:
            overlaps = [(target, overlap) for target in targets if (overlap := _overlap(box, target))]
            if not overlaps:
                continue
            saved = self._read(box)
            for target, overlap in overlaps:
                source, destination = _slices(overlap, box.offsets), _slices(overlap, target.offsets)
                target.data[destination].copy_(saved[source])

    def _check_tiling(self, key: str) -> None:
        """Raises DamagedError unless the boxes of a tensor hold each of its elements once."""
        boxes = self._boxes[key]
        shape = boxes[0].shape
        if any(box.shape != shape for box in boxes) or not tiles(shape, ((box.offsets, box.sizes) for box in boxes)):
            raise DamagedError(
                f"{self.folder / MANIFEST}: damaged ({key}: its {len(boxes)} boxes leave a gap or overlap); take "
                f"another checkpoint"
            )

    def _read(self, box: Box) -> Tensor:
        """Reads the box into memory that the next read overwrites."""
        elements = math.prod(box.sizes)
        if elements > self._memory.numel():
            self._memory = torch.empty(elements)
        tensor = self._memory[:elements].view(box.sizes)
        self._file(box.file).read(box, tensor)
        return tensor

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name, self.file_bytes[name])
        return self._files[name]


Span = tuple[int, int]


def _overlap(box: Box, fragment: Fragment) -> list[Span] | None:
    """Returns the span of each dim of the global tensor that both cover, if any."""
    spans = []
    for a, a_size, b, b_size in zip(box.offsets, box.sizes, fragment.offsets, fragment.data.shape):
        start, stop = max(a, b), min(a + a_size, b + b_size)
        if start >= stop:
            return None
        spans.append((start, stop))
    return spans


def _slices(spans: list[Span], offsets: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start - offset, stop - offset) for (start, stop), offset in zip(spans, offsets))
