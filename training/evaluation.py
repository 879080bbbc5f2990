"""Measures the loss on text, in nats a token and in bits a byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from triplane.data.config import DataConfig
from triplane.data.corpus import Corpus
from triplane.data.loader import SequenceDataset
from triplane.data.opening import validation_plan
from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.transformer import Transformer
from triplane.parallel.engine import StepLoss
from triplane.training.feed import Feed

Evaluate = Callable[[list[Batch]], StepLoss]
"""Returns the loss over the given micro-batches and those of the other dp ranks."""


class TextLoss(NamedTuple):
    """The loss on some text."""

    nats: float
    """Mean over tokens with a target."""
    tokens: int
    """Tokens with a target."""
    bytes_per_token: float
    """Bytes of text that such a target spells."""

    @property
    def bits_per_byte(self) -> float:
        """The loss in a unit that is comparable between tokenizers; 0 without text."""
        return self.nats / math.log(2) / self.bytes_per_token if self.bytes_per_token else 0.0

    @classmethod
    def over(cls, parts: Sequence["TextLoss"]) -> "TextLoss":
        """Returns the loss on all of these texts."""
        if len(parts) == 1:
            return parts[0]
        tokens = sum(part.tokens for part in parts)
        weights = [part.tokens / max(1, tokens) for part in parts]
        return cls(
            nats=sum(weight * part.nats for weight, part in zip(weights, parts)),
            tokens=tokens,
            bytes_per_token=sum(weight * part.bytes_per_token for weight, part in zip(weights, parts)),
        )


@dataclass(frozen=True)
class HeldOut:
    """Validation split of a source."""

    name: str
    dataset: SequenceDataset
    counts: bool
    """Whether it is in the total, which covers the sources that the run starts with: appending one, or a phase with
    other weights, does not move it, so `keep_best` compares like with like."""


def held_out(config: DataConfig, corpora: Sequence[Corpus]) -> list[HeldOut]:
    """Returns the validation splits of the sources, in config order."""
    names = [source.corpus.rstrip("/").rpartition("/")[2] for source in config.sources]
    return [
        HeldOut(
            name=name if names.count(name) == 1 else f"{name}-{number}",
            dataset=SequenceDataset([corpus], validation_plan(config, [corpus]), config.document_mask),
            counts=source.weight > 0,
        )
        for number, (name, source, corpus) in enumerate(zip(names, config.sources, corpora))
    ]


def validation_losses(
    evaluate: Evaluate, feed: Feed, sources: Sequence[HeldOut], *, sequences: int
) -> tuple[TextLoss, dict[str, TextLoss]]:
    """Returns the loss in total and by source.

    Reads the first `sequences`: an equal share of each source that counts, or all of a smaller one. Sources that do not
    count are read as far as the largest share.
    """
    counted = [source for source in sources if source.counts]
    shares = _shares([len(source.dataset) for source in counted], sequences)
    losses = {}
    for source in sources:
        share = shares[counted.index(source)] if source.counts else min(max(shares), len(source.dataset))
        losses[source.name] = _loss(evaluate, feed, source.dataset, sequences=share)
    return TextLoss.over([losses[source.name] for source in counted]), losses


def _shares(lengths: Sequence[int], sequences: int) -> list[int]:
    """Divides `sequences` evenly among datasets of the given lengths; what one lacks, others add."""
    shares = [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        later = sum(length >= lengths[number] for i, length in enumerate(lengths) if not shares[i])
        shares[number] = min(lengths[number], max(1, -(-(sequences - sum(shares)) // max(1, later))))
    return shares


def _loss(evaluate: Evaluate, feed: Feed, dataset: SequenceDataset, *, sequences: int) -> TextLoss:
    product = feed.dp.size * feed.micro_batch_size
    # Every rank needs whole micro-batches: sequences past the end of the corpus have no targets.
    rounded = -(-sequences // product) * product
    (batches,) = feed.steps(dataset, global_batch_size=rounded, consumed_sequences=0, steps=1)
    loss = evaluate(batches)
    return TextLoss(
        nats=float(loss.cross_entropy),
        tokens=int(loss.tokens),
        bytes_per_token=dataset.bytes_per_target(range(sequences)),
    )


def evaluate_model(model: Transformer) -> Evaluate:
    """Returns a function that evaluates a whole model on one device."""

    @torch.inference_mode()
    def evaluate(batches: list[Batch]) -> StepLoss:
        losses = [model(batch) for batch in batches]
        tokens = sum((batch.targets_T != IGNORED_TARGET).sum() for batch in batches)
        assert isinstance(tokens, torch.Tensor)
        _, cross_entropy, z, further = (torch.stack(sums).sum() / tokens.clamp(min=1) for sums in zip(*losses))
        return StepLoss(cross_entropy, z, further, tokens=tokens, added=torch.zeros_like(z), tallies={})

    return evaluate
