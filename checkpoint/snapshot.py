"""Copies of a rank's state in host memory, from which it is written while training changes the state."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from triplane.parallel.placement import Fragment


class Snapshot:
    """Host memory as large as the fragments of a rank, pinned for a GPU; used again by each save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, fragments: Sequence[Fragment], changed: torch.cuda.Event | None) -> list[Fragment]:
        """The same fragments with copies of their data; overwrites those of the call before.

        `changed` was recorded on the GPU after their last change; the copy waits for that, and for nothing later.
        """
        elements = sum(fragment.data.numel() for fragment in fragments)
        if elements != self._memory.numel():
            self._memory = torch.empty(elements, pin_memory=changed is not None)
        if changed is None:
            return self._copies(fragments)
        stream = torch.cuda.Stream(fragments[0].data.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            changed.wait()
            copies = self._copies(fragments)
        stream.synchronize()
        return copies

    def _copies(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        copies, start = [], 0
        for fragment in fragments:
            copy = self._memory.narrow(0, start, fragment.data.numel()).view(fragment.data.shape)
            copies.append(replace(fragment, data=copy.copy_(fragment.data, non_blocking=True)))
            start += copy.numel()
        return copies


def last_change(fragments: Sequence[Fragment]) -> torch.cuda.Event | None:
    """What `take` waits for: all that this thread has given the GPU to do so far; None on a CPU."""
    if not any(fragment.data.is_cuda for fragment in fragments):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
