"""Copies of a rank's state in host memory, from which it is written while training changes the state."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from triplane.parallel.placement import Fragment


class Snapshot:
    """Host memory as large as the fragments of a rank, pinned for a GPU; used again by each save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The same fragments with copies of their data; overwrites those of the call before."""
        elements = sum(fragment.data.numel() for fragment in fragments)
        on_gpu = any(fragment.data.is_cuda for fragment in fragments)
        if elements != self._memory.numel():
            self._memory = torch.empty(elements, pin_memory=on_gpu)
        copies, start = [], 0
        for fragment in fragments:
            copy = self._memory.narrow(0, start, fragment.data.numel()).view(fragment.data.shape)
            copies.append(replace(fragment, data=copy.copy_(fragment.data, non_blocking=True)))
            start += copy.numel()
        if on_gpu:
            torch.cuda.synchronize()
        return copies
