"""Batches as a function of (corpora, plan, position): ranks and workers divide the work and never change it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triplane.data.corpus import Corpus
from triplane.data.errors import DataError
from triplane.data.plan import Chunk, Plan

IGNORED_TARGET = -100
"""A position with this target has no loss."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences end to end: T = sequences x L."""

    tokens_T: Tensor
    """(T,) int64."""
    targets_T: Tensor
    """(T,) int64, the next tokens, or IGNORED_TARGET."""
    bounds: tuple[int, ...]
    """0, where further sequences, pieces of them or documents start, T."""


class SequenceDataset(Dataset[MicroBatch]):
    """Positions -> their sequences end to end."""

    def __init__(self, corpora: Sequence[Corpus], plan: Plan, document_mask: bool):
        self._corpora = corpora
        self._plan = plan
        self._document_mask = document_mask
        self._bos_id = corpora[0].manifest.bos_id
        self._chunk = Chunk(0, 0, 0, [], [])

    def __len__(self) -> int:
        """Sequences in one pass over all sources."""
        return self._plan.n_sequences

    def __getitem__(self, positions: Sequence[int]) -> MicroBatch:
        """All of `positions` must have sequences of one length."""
        seq_len = self._around(positions[0]).seq_len
        size = len(positions) * seq_len
        tokens_T = torch.empty(size, dtype=torch.int64)
        targets_T = torch.empty(size, dtype=torch.int64)
        tokens, targets = tokens_T.numpy(), targets_T.numpy()
        joints: list[int] = []
        for row, position in enumerate(positions):
            chunk = self._around(position)
            assert chunk.seq_len == seq_len, (positions, seq_len, chunk.seq_len)
            offset = position - chunk.start
            corpus = self._corpora[chunk.sources[offset]]
            at, end = row * seq_len, (row + 1) * seq_len
            for start, count in chunk.pieces[offset]:
                stored = corpus.view(start, count + 1)
                joints.append(at)
                tokens[at : at + count] = stored[:-1]
                targets[at : at + count] = stored[1:]
                at += count
            if at < end:
                # Padding sees nothing and is a document of its own.
                joints.append(at)
                tokens[at:end] = 0
                targets[at:end] = IGNORED_TARGET
        bounds = {*joints, size}
        if self._document_mask:
            # Each document begins with bos, and nothing else is bos; nothing predicts it.
            (starts,) = (targets == self._bos_id).nonzero()
            targets[starts] = IGNORED_TARGET
            bounds.update((starts + 1).tolist())
        return MicroBatch(tokens_T, targets_T, tuple(sorted(bounds)))

    def _around(self, position: int) -> Chunk:
        if not self._chunk.start <= position < self._chunk.stop:
            self._chunk = self._plan.chunk(position)
        return self._chunk


def batches(
    dataset: SequenceDataset,
    *,
    consumed_sequences: int,
    steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
) -> Iterator[MicroBatch]:
    """Yields the micro-batches of `dp_rank` for `steps` steps, step after step.

    Step s of this call reads the positions `consumed_sequences + s * global_batch_size` and on, of which each dp rank
    has every `dp_size`-th. Raises DataError, from workers too, if a corpus is damaged.
    """
    share, rest = divmod(global_batch_size, dp_size)
    assert rest == 0 and share % micro_batch_size == 0, (global_batch_size, dp_size, micro_batch_size)
    stride = micro_batch_size * dp_size
    starts = range(consumed_sequences + dp_rank, consumed_sequences + steps * global_batch_size, stride)
    positions = (range(start, start + stride, dp_size) for start in starts)
    if num_workers == 0:
        yield from map(dataset.__getitem__, positions)
        return
    loader = DataLoader(
        dataset,
        sampler=positions,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it draws from the global one
    )
    try:
        yield from loader
    except DataError as error:
        # A worker's error arrives wrapped in its traceback.
        raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error


def _as_it_is(micro_batch: Any) -> Any:
    return micro_batch
