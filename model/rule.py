"""The rule by which a query sees keys and a score becomes a weight: all that attention is told beside its tensors."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rule:
    """Causal attention within each segment of a batch."""

    scale: float
    """Factor of each product of a query and a key."""
    window: int | None = None
    """Keys that a query sees, the one at its own place and those just before it; None: all of them."""
    softcap: float | None = None
    """Bounds scores: score becomes softcap * tanh(score / softcap), before a bias is added (Gemma 2)."""

    def __post_init__(self) -> None:
        assert self.window is None or self.window > 0, self.window
        assert self.softcap is None or self.softcap > 0, self.softcap

    def within(self, longest: int) -> "Rule":
        """Returns the rule without its window where it hides nothing, in segments of at most `longest` tokens."""
        return self if self.window is None or self.window < longest else replace(self, window=None)
