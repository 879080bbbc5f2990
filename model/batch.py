"""One micro-batch as the model reads it, flattened over batch and sequence.

Shape suffixes in this package: T tokens (batch x sequence), D dim, F hidden_dim, H query heads,
G key/value heads, K head_dim, V vocabulary, B sequences, S tokens per sequence; of experts: E experts, A those that a
token passes, S tokens times A.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED_TARGET = -100
"""Positions with this target have no loss."""


@dataclass(frozen=True)
class Batch:
    """T tokens in segments that cannot see each other.

    Segment i holds the tokens `bounds[i]` to `bounds[i + 1]` and attends causally within itself. `bounds`,
    `longest` and `uniform` are on the host, so that attention needs no device sync; the last two are stored,
    so that a compiled block that reads only them is not recompiled for each number of segments.
    """

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    bounds: tuple[int, ...]
    bounds_int32: Tensor
    longest: int
    """Tokens in the longest segment."""
    uniform: bool
    """True if all segments have the same length."""
    sequences_T: Tensor
    """The number of each token's sequence."""
    sequences: int
    """Sequences of equal lengths, each a row of the training data."""
    scale: float | None = None
    """Multiplies the losses that layers add to the objective; None where nothing is trained."""
    further: tuple[tuple[Tensor, Tensor], ...] = ()
    """For each module that predicts further, the tokens that it reads and its targets; see `ahead`."""

    @classmethod
    def build(cls, tokens_T: Tensor, targets_T: Tensor, bounds: Sequence[int], *, sequences: int = 1) -> "Batch":
        """Derives positions (0 at the start of each segment) from `bounds`, which runs from 0 to T."""
        assert bounds[0] == 0 and bounds[-1] == len(tokens_T) == len(targets_T), (bounds[-1], tokens_T.shape)
        assert len(tokens_T) % sequences == 0, (tokens_T.shape, sequences)
        bounds_int32 = torch.tensor(bounds, dtype=torch.int32)
        lengths = bounds_int32.diff()
        starts_T = torch.repeat_interleave(bounds_int32[:-1], lengths)
        positions_T = torch.arange(len(tokens_T), dtype=torch.int32) - starts_T
        longest = int(lengths.max())
        uniform = longest * len(lengths) == len(tokens_T)
        return cls(
            tokens_T=tokens_T,
            targets_T=targets_T,
            positions_T=positions_T,
            bounds=tuple(bounds),
            bounds_int32=bounds_int32,
            longest=longest,
            uniform=uniform,
            sequences_T=torch.arange(len(tokens_T), dtype=torch.int32) // (len(tokens_T) // sequences),
            sequences=sequences,
        )

    @classmethod
    def padded(cls, tokens: Sequence[int], multiple: int) -> "Batch":
        """Makes one segment of `tokens`, padded to a multiple; causal attention ignores what follows the last token.

        Positions grow no further, since a network may number only so many.
        """
        ids_T = torch.zeros(len(tokens) + -len(tokens) % multiple, dtype=torch.int64)
        ids_T[: len(tokens)] = torch.tensor(tokens)
        batch = cls.build(ids_T, torch.full_like(ids_T, IGNORED_TARGET), (0, len(ids_T)))
        return replace(batch, positions_T=batch.positions_T.clamp(max=len(tokens) - 1))

    def ahead(self, depth: int) -> "Batch":
        """Returns the batch with the tokens 1 to `depth` after each, and the targets after its own.

        The last one of a segment is followed by itself, without a target.
        """
        tokens_T, targets_T, further = self.tokens_T, self.targets_T, []
        ends = self.bounds_int32[1:].long() - 1
        for _ in range(depth):
            last = tokens_T[ends]
            tokens_T, targets_T = tokens_T.roll(-1), targets_T.roll(-1)
            tokens_T[ends], targets_T[ends] = last, IGNORED_TARGET
            further.append((tokens_T, targets_T))
        return replace(self, further=tuple(further))

    def to(self, device: torch.device) -> "Batch":
        """Copies the batch to `device`, asynchronously if it is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copies the batch to page-locked memory, from which a GPU copies on its own."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("tokens_T", "targets_T", "positions_T", "bounds_int32", "sequences_T")
        copies: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **copies)
