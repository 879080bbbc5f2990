"""How much text a run reads, beside what its corpora hold and what its model can take up."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from triplane.data.opening import Sources
from triplane.model.count import count_parameters
from triplane.training.config import RunConfig
from triplane.training.units import format_count

_MOST_EPOCHS = 4
"""Up to so many, repeated text is nearly worth new text (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Amount:
    """Tokens of a whole run."""

    read: float
    """By all ranks, in all steps."""
    held: int
    """In the training splits of all sources that are read."""
    parameters: int
    epochs: dict[str, float]
    """How often each source is read, by its name in the config."""

    @classmethod
    def of(cls, config: RunConfig, sources: Sources) -> "Amount":
        """That of a run over opened corpora."""
        names = [source.corpus for source in config.data.sources]
        read = dict.fromkeys(names, 0.0)
        last = config.training.steps * config.training.global_batch_size
        ends = [*config.data.timeline(), (last, [], 0)]
        for (start, weights, seq_len), (end, *_) in pairwise(ends):
            tokens = max(0, min(end, last) - start) * seq_len
            for name, weight in zip(names, weights):
                read[name] += tokens * weight / sum(weights)
        held = {name: corpus.tokens for name, corpus in zip(names, sources.train) if read[name]}
        epochs = {name: read[name] / tokens for name, tokens in held.items()}
        return cls(sum(read.values()), sum(held.values()), count_parameters(config.model), epochs)

    def describe(self) -> str:
        """One line."""
        epochs = self.read / self.held
        return (
            f"{format_count(self.read)} tokens of {format_count(self.held)} in the corpora ({epochs:.3g} epochs), "
            f"{self.read / self.parameters:.3g} for each of {format_count(self.parameters)} parameters"
        )

    def warnings(self) -> Iterator[str]:
        """Sources that are read too often."""
        for name, epochs in self.epochs.items():
            if epochs > _MOST_EPOCHS:
                yield (
                    f"{name}: read {epochs:,.1f} times; over {_MOST_EPOCHS} epochs repeated text teaches little: "
                    f"prepare more text, or take fewer training.steps"
                )
