"""Copies of a rank's state in host memory, from which it is written while training changes the state."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from triplane.parallel.placement import Fragment

_BUFFER_BYTES = 2**30
"""Pinned memory comes in powers of two, and all launches wait while it is made: so it is made bit by bit."""


class Snapshot:
    """Host memory as large as the fragments of a rank, pinned for a GPU; used again by each save."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, fragments: Sequence[Fragment], changed: torch.cuda.Event | None) -> list[Fragment]:
        """The same state as fragments of copies, large ones in pieces; overwrites those of the call before.

        `changed` was recorded on the GPU after their last change; the copy waits for that, and for nothing later.
        """
        groups = _groups([piece for fragment in fragments for piece in _pieces(fragment)])
        sizes = [sum(piece.data.numel() for piece in group) for group in groups]
        if sizes != [buffer.numel() for buffer in self._buffers]:
            self._buffers = []  # before there are others
            self._buffers = [torch.empty(size, pin_memory=changed is not None) for size in sizes]
        if changed is None:
            return self._copies(groups)
        device = next(fragment.data.device for fragment in fragments if fragment.data.is_cuda)
        # A thread begins on GPU 0, and leaving the stream returns there, which takes half a GiB of it for each rank.
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            changed.wait()
            copies = self._copies(groups)
        stream.synchronize()
        return copies

    def _copies(self, groups: list[list[Fragment]]) -> list[Fragment]:
        copies = []
        for buffer, group in zip(self._buffers, groups, strict=True):
            parts = torch.split(buffer, [piece.data.numel() for piece in group])
            for piece, part in zip(group, parts):
                copy = part.view(piece.data.shape).copy_(piece.data, non_blocking=True)
                copies.append(replace(piece, data=copy))
        return copies


def _pieces(fragment: Fragment) -> Iterator[Fragment]:
    """The fragment as runs of rows that fit a buffer."""
    row = fragment.data[0].nbytes if len(fragment.data) else 1
    begin, *rest = fragment.offsets
    for rows in torch.split(fragment.data, max(1, _BUFFER_BYTES // row)):
        yield replace(fragment, offsets=(begin, *rest), data=rows)
        begin += len(rows)


def _groups(pieces: list[Fragment]) -> list[list[Fragment]]:
    """Runs of pieces that fit a buffer together."""
    groups: list[list[Fragment]] = []
    room = 0
    for piece in pieces:
        if piece.data.nbytes > room:
            groups.append([])
            room = _BUFFER_BYTES
        groups[-1].append(piece)
        room -= piece.data.nbytes
    return groups


def last_change(fragments: Sequence[Fragment]) -> torch.cuda.Event | None:
    """What `take` waits for: all that this thread has given the GPU to do so far; None on a CPU."""
    if not any(fragment.data.is_cuda for fragment in fragments):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
