"""Presents a checkpoint's weights as a mapping by name, read on access."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from triplane.checkpoint.reader import Checkpoint

_KIND = "weight/"


class CheckpointWeights(Mapping[str, Tensor]):
    """Whole fp32 tensors on the host by the model's parameter names; keeps none of them."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._names = [key.removeprefix(_KIND) for key in checkpoint.shapes if key.startswith(_KIND)]

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(_KIND + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
