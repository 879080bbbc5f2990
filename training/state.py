"""The position of a run: all state besides weights and moments."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class State:
    """The position of a run, which determines the next data, the learning rate and what is a spike."""

    step: int = 0
    """Optimizer updates done."""
    consumed_sequences: int = 0
    """Sequences read or skipped, over all ranks: the next position in the order of the data."""
    tokens_seen: int = 0
    """Tokens read, over all ranks, without padding."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Positions (start, end) that caused anomalies and are skipped."""
    recent: tuple[tuple[float, float], ...] = ()
    """Loss and gradient norm of the last steps."""
    unlogged: tuple[float, int, float] = (0.0, 0, 0.0)
    """Sums over the steps since the last regular log: the loss in nats, targets, and bytes of text that they spell."""
    noise: tuple[float, float] = (0.0, 0.0)
    """Running averages of the variance of a token's gradient, and of the squared norm of their mean; see noise.py."""

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "State":
        """Builds the state from the JSON of a checkpoint, which has further keys."""
        tables = {name: tuple(map(tuple, saved.get(name, ()))) for name in ("skipped", "recent")}
        return cls(
            step=saved["step"],
            consumed_sequences=saved["consumed_sequences"],
            tokens_seen=saved["tokens_seen"],
            unlogged=tuple(saved.get("unlogged", cls.unlogged)),
            noise=tuple(saved.get("noise", cls.noise)),
            **tables,
        )

    def after(self, sequences: int, tokens: int) -> "State":
        """Returns the state one update later."""
        position = self.consumed_sequences + sequences
        return replace(self, step=self.step + 1, consumed_sequences=position, tokens_seen=self.tokens_seen + tokens)

    def skipping(self, start: int, sequences: int) -> "State":
        """Returns the state that knows that the batch at `start` is to be skipped."""
        return replace(self, skipped=tuple(sorted([*self.skipped, (start, start + sequences)])))

    def before(self, sequences: int, changes: Iterable[int] = ()) -> "State":
        """Returns the state before the next batch that has room: it overlaps no skipped one and lies on one side of
        each of the `changes`, positions from which sequences have another length."""
        position = self.consumed_sequences
        for start, stop in sorted([*self.skipped, *((change, change) for change in changes)]):
            if start < position + sequences and position < stop:
                position = stop
        return replace(self, consumed_sequences=position)

    def remembering(self, loss: float, gradient_norm: float, steps: int) -> "State":
        """Returns the state with one more step in `recent`, of which the last `steps` are kept."""
        return replace(self, recent=(*self.recent, (loss, gradient_norm))[-steps:])

    def adding(self, loss: float, targets: int, text_bytes: float) -> "State":
        """Returns the state with the loss of one more step, a mean over `targets`, in `unlogged`."""
        losses, count, length = self.unlogged
        return replace(self, unlogged=(losses + loss * targets, count + targets, length + text_bytes))
