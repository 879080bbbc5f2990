"""The loss on held-out text."""

from collections.abc import Callable

import torch

from triplane.data.loader import SequenceDataset
from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.transformer import Transformer
from triplane.parallel.engine import StepLoss
from triplane.training.batches import Feed

Evaluate = Callable[[list[Batch]], StepLoss]
"""The loss over the given micro-batches and those of the other dp ranks."""


def validation_loss(evaluate: Evaluate, feed: Feed, validation: SequenceDataset, sequences: int) -> float:
    """Mean over tokens, nats, of the first `sequences` of the plan, or of all if it has fewer."""
    product = feed.dp.size * feed.micro_batch_size
    # Rounded up to whole micro-batches of all ranks: past the corpus come sequences without targets.
    rounded = -(-min(sequences, len(validation)) // product) * product
    (batches,) = feed.steps(validation, rounded, 0, 1)
    return float(evaluate(batches).cross_entropy)


def evaluate_model(model: Transformer) -> Evaluate:
    """By a whole model on one device."""

    @torch.inference_mode()
    def evaluate(batches: list[Batch]) -> StepLoss:
        losses = [model(batch) for batch in batches]
        tokens = sum((batch.targets_T != IGNORED_TARGET).sum() for batch in batches)
        assert isinstance(tokens, torch.Tensor)
        _, cross_entropy, z = (torch.stack(sums).sum() / tokens.clamp(min=1) for sums in zip(*losses))
        return StepLoss(cross_entropy, z, tokens)

    return evaluate
