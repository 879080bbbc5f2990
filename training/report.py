"""What a run shows and records: on rank 0 the console, `metrics.jsonl` and TensorBoard; elsewhere nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from triplane.training.metrics import METRICS, MetricsWriter
from triplane.training.progress import Progress


class Report(Protocol):
    """Told by the training loop on every rank."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def validation(self, step: int, loss: float) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Silent:
    """The report of every rank but the first: values are reduced over ranks before they are reported."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def validation(self, step: int, loss: float) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class RunReport:
    """The report of rank 0."""

    def __init__(self, run_dir: Path, steps: int, resume_step: int):
        self._writer = MetricsWriter(run_dir, resume_step)
        self._progress = Progress(steps)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.log(step, values)
        self._progress.update(step, values)

    def validation(self, step: int, loss: float) -> None:
        self._writer.log(step, {"validation_loss": loss})
        self.message(f"step {step}: {METRICS['validation_loss'].format(loss)}")

    def sample(self, step: int, text: str) -> None:
        self._writer.text(step, "sample", text)

    def message(self, text: str) -> None:
        self._progress.message(text)

    def close(self) -> None:
        self._progress.close()
        self._writer.close()
