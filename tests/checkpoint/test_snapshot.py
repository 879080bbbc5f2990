"""Copies of the state: in several buffers, large tensors in pieces, no byte lost, memory used again."""

import pytest
import torch
from torch import Size

from triplane.checkpoint import snapshot
from triplane.checkpoint.snapshot import Snapshot
from triplane.parallel.placement import Fragment


def fragment(name: str, *shape: int, offsets: tuple[int, ...] | None = None) -> Fragment:
    return Fragment(
        kind="weight",
        name=name,
        shape=Size((100, *shape[1:])),
        offsets=offsets or (0,) * len(shape),
        data=torch.randn(shape),
        primary=True,
    )


def whole(fragments: list[Fragment]) -> dict[str, torch.Tensor]:
    """The tensors that fragments make, NaN where there is none."""
    tensors = {f.name: torch.full(f.shape, torch.nan) for f in fragments}
    for f in fragments:
        tensors[f.name][tuple(slice(at, at + size) for at, size in zip(f.offsets, f.data.shape))] = f.data
    return tensors


def test_pieces_are_the_state_and_buffers_are_small_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_BUFFER_BYTES", 4 * 64)
    state = [fragment("a", 30, 5, offsets=(7, 0)), fragment("b", 9), fragment("c", 20, 3), fragment("d", 100)]
    keeper = Snapshot()
    copies = keeper.take(state, None)
    sizes = [buffer.numel() for buffer in keeper._buffers]
    assert max(sizes) <= 64 and sum(sizes) == sum(f.data.numel() for f in state)
    torch.testing.assert_close(whole(copies), whole(state), equal_nan=True)
    addresses = [buffer.data_ptr() for buffer in keeper._buffers]
    for f in state:
        f.data.add_(1)
    again = keeper.take(state, None)
    torch.testing.assert_close(whole(again), whole(state), equal_nan=True)
    assert [buffer.data_ptr() for buffer in keeper._buffers] == addresses


def test_no_more_buffers_than_needed() -> None:
    keeper = Snapshot()
    keeper.take([fragment("a", 30, 5), fragment("b", 9)], None)
    assert [buffer.numel() for buffer in keeper._buffers] == [159]
