"""Feeds batches of token sequences to the device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from triplane.data.loader import MicroBatch, SequenceDataset, batches
from triplane.model.batch import Batch
from triplane.parallel.mesh import Axis


@dataclass(frozen=True)
class Feed:
    """Feeds this dp rank's share of each global batch; its tp and pp ranks read the same."""

    micro_batch_size: int
    """Sequences."""
    num_workers: int
    local_ranks: int
    """Ranks on this machine, which share the cache of remote shards."""
    dp: Axis
    device: torch.device

    def steps(
        self, dataset: SequenceDataset, *, global_batch_size: int, consumed_sequences: int, steps: int
    ) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each of `steps` steps, starting at position `consumed_sequences`."""
        micro_batches = batches(
            dataset,
            consumed_sequences=consumed_sequences,
            steps=steps,
            global_batch_size=global_batch_size,
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.dp.rank,
            dp_size=self.dp.size,
            num_workers=self.num_workers,
            local_ranks=self.local_ranks,
        )
        per_step = global_batch_size // (self.dp.size * self.micro_batch_size)
        for _ in range(steps):
            yield [to_batch(next(micro_batches), self.device) for _ in range(per_step)]


def to_batch(micro_batch: MicroBatch, device: torch.device) -> Batch:
    """Adds the positions within documents, and copies to the device, asynchronously to a GPU."""
    batch = Batch.build(
        micro_batch.tokens_T, micro_batch.targets_T, micro_batch.bounds, sequences=micro_batch.sequences
    )
    return (batch.pinned() if device.type == "cuda" else batch).to(device)
