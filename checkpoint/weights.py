"""Presents the weights of checkpoints as mappings by name, read on access, and writes such a mapping."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from triplane.checkpoint.manifest import Box
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.tensors import write_tensors
from triplane.parallel.placement import Fragment
from triplane.parallel.update import AVERAGE
from triplane.storage.errors import CheckpointError


class CheckpointWeights(Mapping[str, Tensor]):
    """Whole fp32 tensors on the host by the model's parameter names; keeps none of them."""

    def __init__(self, checkpoint: Checkpoint, *, average: bool = False):
        """`average` takes the average of each weight that is trained; raises CheckpointError if there is none."""
        self._checkpoint = checkpoint
        self._keys = self._of_kind("weight")
        if average:
            averages = self._of_kind(AVERAGE)
            if not averages:
                raise CheckpointError(
                    f"{checkpoint.folder}: holds no average of the weights: it was trained without "
                    f"optimizer.average_decay; take the weights"
                )
            self._keys |= averages

    def _of_kind(self, kind: str) -> dict[str, str]:
        """Returns the keys of a kind's tensors by the names of parameters."""
        keys = (key.split("/", 1) for key in self._checkpoint.shapes)
        return {name: f"{kind}/{name}" for its, name in keys if its == kind}

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(self._keys.get(name, f"weight/{name}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class MeanWeights(Mapping[str, Tensor]):
    """The mean of the weights of checkpoints of one network, summed in fp64."""

    def __init__(self, checkpoints: Sequence[Checkpoint]):
        self._each = [CheckpointWeights(checkpoint) for checkpoint in checkpoints]

    def __getitem__(self, name: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for weights in self._each:
            total = total + weights[name]
        return (total / len(self._each)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._each[0])

    def __len__(self) -> int:
        return len(self._each[0])


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> tuple[list[Box], dict[str, int]]:
    """Writes whole tensors in fp32 into an unfinished checkpoint, a file each; returns boxes, and sizes of files."""
    boxes, sizes = [], {}
    for name, weight in weights.items():
        data = weight.float().contiguous()
        file = folder / f"{name}.safetensors"
        fragment = Fragment(
            kind="weight", name=name, shape=data.shape, offsets=(0,) * data.dim(), data=data, primary=True
        )
        written, sizes[file.name] = write_tensors(file, [fragment])
        boxes += written
    return boxes, sizes
