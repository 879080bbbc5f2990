"""The moments of a run at which trackers, and metrics of the user's own, are called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triplane.training.config import RunConfig

if TYPE_CHECKING:
    from triplane.model.batch import Batch
    from triplane.training.evaluation import Evaluate

Sums = tuple[Any, Any]
"""A numerator and a denominator: numbers, or tensors of one."""


@dataclass(frozen=True)
class Run:
    """The run as it starts or resumes."""

    config: RunConfig
    """As resolved: no `auto` is left."""
    toml: str
    """The config as it stands in the run folder."""
    choices: Mapping[str, object]
    """The config's values, numbers or text, by keys such as `optimizer.lr`."""
    id: str
    """The same after each resume."""
    step: int
    """The steps done; records of later ones are void."""


class Callback:
    """A subclass overrides the moments that it needs. Rank 0 alone is called, except by `measure`.

    An error of a moment on rank 0 is shown and does not end the run; one of `measure` does.
    """

    def problems(self) -> Iterator[str]:
        """Yields why it cannot start, a line each, before any rank does."""
        yield from ()

    def start(self, run: Run) -> None:
        """Called before the first step of a start or resume. After an error nothing else is called but `measure`."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Takes metrics of a step by their names in `METRICS`; those from `measure` are named `user/NAME`."""

    def sample(self, step: int, text: str) -> None:
        """Takes text that the model has generated."""

    def event(self, step: int, event: str, details: Mapping[str, object]) -> None:
        """Takes what is appended to `history.jsonl`: a save, a rollback, the end."""

    def rewind(self, step: int) -> None:
        """The run was rolled back to this step; records of later ones are void."""

    def close(self) -> None:
        """Called at the end of the run, or of this part of it; not after a crash."""

    def measure(self, batches: "Sequence[Batch]", evaluate: "Evaluate") -> Mapping[str, Sums]:
        """Called on every rank after logged steps, with the step's micro-batches of its data-parallel rank.

        It cannot rely on `start`, which is called on rank 0 alone.

        Returns sums by name, the same names on every rank. They are added over the data-parallel ranks, and the metric
        is their quotient, so that it is exact under every layout. `evaluate` returns the loss over the batches of all
        data-parallel ranks after the step; every rank has to call it, with as many batches.
        """
        return {}
