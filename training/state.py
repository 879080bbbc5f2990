"""How far a run is: all that is not in the weights and moments, a few integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """The position of a run; the order of the data and the learning rate are functions of it."""

    step: int = 0
    """Optimizer updates done."""
    consumed_sequences: int = 0
    """Sequences read, over all ranks: the next position in the order of the data."""
    tokens_seen: int = 0
    """Tokens read, over all ranks."""

    def after(self, sequences: int, tokens: int) -> "State":
        """One update further."""
        return State(self.step + 1, self.consumed_sequences + sequences, self.tokens_seen + tokens)
