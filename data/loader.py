"""Batches as a function of (corpus, order, position): ranks and workers divide the work and never change it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triplane.data.corpus import Corpus
from triplane.data.errors import DataError
from triplane.data.order import Order

IGNORED_TARGET = -100
"""A position with this target has no loss."""


class Sequence(NamedTuple):
    """L tokens and their successors."""

    tokens: NDArray[np.int64]
    """(L,)"""
    targets: NDArray[np.int64]
    """(L,) the next tokens, or IGNORED_TARGET."""
    bounds: tuple[int, ...]
    """0, where further documents start, L."""


class MicroBatch(NamedTuple):
    """Sequences end to end: T = sequences x L."""

    tokens_T: Tensor
    targets_T: Tensor
    bounds: tuple[int, ...]
    """0, where further sequences or documents start, T."""


def count_sequences(tokens: int, seq_len: int) -> int:
    """Sequences in which each token but the first is a target once; the last one may be partial."""
    return -(-(tokens - 1) // seq_len)


class SequenceDataset(Dataset[Sequence]):
    """Position -> sequence. Sequence i of a corpus reads the tokens i L to (i + 1) L, that one included.

    With an `order` positions run on through all epochs. Without one they are the stored order, as validation reads
    it, and past the end come sequences without targets, so that a batch of any size can be filled up.
    """

    def __init__(self, corpus: Corpus, order: Order | None, seq_len: int, document_mask: bool):
        self._corpus = corpus
        self._order = order
        self._seq_len = seq_len
        self._document_mask = document_mask
        self._n_sequences = count_sequences(corpus.tokens, seq_len)
        assert order is None or order.n_sequences == self._n_sequences, (order.n_sequences, self._n_sequences)

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return self._n_sequences

    def __getitem__(self, position: int) -> Sequence:
        seq_len = self._seq_len
        start = seq_len * (position if self._order is None else self._order[position])
        count = min(seq_len + 1, self._corpus.tokens - start)
        tokens = np.zeros(seq_len, np.int64)
        targets = np.full(seq_len, IGNORED_TARGET, np.int64)
        if count < 2:
            return Sequence(tokens, targets, (0, seq_len))
        stored, starts = self._corpus.read(start, count)
        n_targets = count - 1
        tokens[:n_targets] = stored[:-1]
        targets[:n_targets] = stored[1:]
        if not self._document_mask:
            return Sequence(tokens, targets, (0, seq_len))
        # Nothing predicts the first token of a document; padding is a document of its own.
        targets[starts - 1] = IGNORED_TARGET
        return Sequence(tokens, targets, tuple(sorted({0, *starts.tolist(), n_targets, seq_len})))


def collate(sequences: list[Sequence]) -> MicroBatch:
    """Lays sequences end to end; their bounds keep them apart."""
    tokens_T = torch.from_numpy(np.concatenate([sequence.tokens for sequence in sequences]))
    targets_T = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences]))
    bounds = [0]
    for sequence in sequences:
        shift = bounds[-1]
        bounds += [shift + bound for bound in sequence.bounds[1:]]
    return MicroBatch(tokens_T, targets_T, tuple(bounds))


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
    has an equal run. Raises DataError, from workers too, if the corpus is damaged.
    """
    share, rest = divmod(global_batch_size, dp_size)
    assert rest == 0 and share % micro_batch_size == 0, (global_batch_size, dp_size, micro_batch_size)
    first = consumed_sequences + dp_rank * share
    starts = (
        first + step * global_batch_size + offset
        for step in range(steps)
        for offset in range(0, share, micro_batch_size)
    )
    loader = DataLoader(
        dataset,
        batch_sampler=(list(range(start, start + micro_batch_size)) for start in starts),
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it draws from the global one
    )
    try:
        yield from loader
    except DataError as error:
        # A worker's error arrives wrapped in its traceback.
        raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error
