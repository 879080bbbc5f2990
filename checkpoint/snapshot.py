"""Copies a rank's state to host memory, from which it is written while training changes the original."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from triplane.parallel.placement import Fragment

_BUFFER_BYTES = 2**30
"""Pinned memory comes in powers of two, and all launches wait for its allocation, so it is allocated in pieces."""


class Snapshot:
    """Host memory as large as a rank's fragments, pinned for a GPU; every save reuses it."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, fragments: Sequence[Fragment], changed: torch.cuda.Event | None) -> list[Fragment]:
        """Returns copies of the fragments, large ones in pieces; overwrites those of the previous call.

        `changed` was recorded on the GPU after their last change; the copy waits for that and nothing later.
        """
        groups = _groups([piece for fragment in fragments for piece in _pieces(fragment)])
        sizes = [sum(piece.data.numel() for piece in group) for group in groups]
        if sizes != [buffer.numel() for buffer in self._buffers]:
            self._buffers = []  # freed before allocating others
            self._buffers = [torch.empty(size, pin_memory=changed is not None) for size in sizes]
        if changed is None:
            return self._copies(groups)
        device = next(fragment.data.device for fragment in fragments if fragment.data.is_cuda)
        # A thread starts on GPU 0, and leaving the stream returns there, which costs half a GiB of it per rank.
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
    """Splits the fragment into runs of rows that fit a buffer."""
    row = fragment.data[0].nbytes if len(fragment.data) else 1
    begin, *rest = fragment.offsets
    for rows in torch.split(fragment.data, max(1, _BUFFER_BYTES // row)):
        yield replace(fragment, offsets=(begin, *rest), data=rows)
        begin += len(rows)


def _groups(pieces: list[Fragment]) -> list[list[Fragment]]:
    """Groups successive pieces that fit a buffer together."""
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
    """Records the event that `take` waits for, after all GPU work of this thread so far; None on a CPU."""
    if not any(fragment.data.is_cuda for fragment in fragments):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
