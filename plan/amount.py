"""Compares how much text a run reads with the size of its corpora and its model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from triplane.data.opening import Sources
from triplane.model.count import count_parameters
from triplane.training.config import RunConfig
from triplane.training.units import format_count

MOST_EPOCHS = 4
"""Up to this many epochs, repeated text is nearly as good as new text (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Amount:
    """Tokens of a whole run."""

    read: float
    """Tokens read by all ranks, in all steps."""
    held: int
    """Tokens in the training splits of all sources that are read."""
    parameters: int
    epochs: dict[str, float]
    """Epochs of each source, by its name in the config."""

    @classmethod
    def of(cls, config: RunConfig, sources: Sources) -> "Amount":
        """Computes the amount of a run over opened corpora."""
        names = [source.corpus for source in config.data.sources]
        read = dict.fromkeys(names, 0.0)
        last = config.training.sequences(config.training.steps)
        ends = [*config.data.timeline(), (last, [], 0)]
        for (start, weights, seq_len), (end, *_) in pairwise(ends):
            tokens = max(0, min(end, last) - start) * seq_len
            for name, weight in zip(names, weights):
                read[name] += tokens * weight / sum(weights)
        held = {name: corpus.tokens for name, corpus in zip(names, sources.train) if read[name]}
        epochs = {name: read[name] / tokens for name, tokens in held.items()}
        return cls(
            read=sum(read.values()),
            held=sum(held.values()),
            parameters=count_parameters(config.model),
            epochs=epochs,
        )

    def describe(self) -> str:
        """Describes the amount in one line."""
        epochs = self.read / self.held
        return (
            f"{format_count(self.read)} tokens of {format_count(self.held)} in the corpora ({epochs:.3g} epochs), "
            f"{self.read / self.parameters:.3g} for each of {format_count(self.parameters)} parameters"
        )

    def warnings(self) -> Iterator[str]:
        """Yields a line for each source that is read too often."""
        for name, epochs in self.epochs.items():
            if epochs > MOST_EPOCHS:
                yield (
                    f"{name}: read {epochs:,.1f} times; over {MOST_EPOCHS} epochs repeated text adds little: "
                    f"prepare more text, or reduce training.steps"
                )
