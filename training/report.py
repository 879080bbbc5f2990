"""Shows and records a run on rank 0: console, `metrics.jsonl`, TensorBoard, Prometheus, `history.jsonl`, trackers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from triplane.checkpoint.store import Save
from triplane.training.callback import Callback, Run
from triplane.training.evaluation import TextLoss
from triplane.training.metrics import METRICS, MetricsWriter
from triplane.training.progress import Progress
from triplane.training.prometheus import Endpoint
from triplane.training.run_log import record_event


class Report:
    """Called by the training loop on every rank, with values that are already reduced over ranks."""

    def __init__(self, run: Run, rank: int, callbacks: Sequence[Callback] = ()):
        self._first = rank == 0
        if self._first:
            self._run_dir = run.config.folder.path
            self._progress = Progress(run.config.training.steps, work=run.config.training.sequences)
            self._callbacks: list[Callback] = [MetricsWriter(self._run_dir, run.step)]
            if (port := run.config.training.prometheus_port) is not None:
                self._callbacks += self._endpoint(port)
            self._tell(run.step, lambda callback: callback.start(run))
            self._callbacks += [callback for callback in callbacks if self._starts(callback, run)]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records and shows the metrics of a step."""
        if self._first:
            self._tell(step, lambda callback: callback.metrics(step, values))
            self._progress.update(step, values)

    def validation(
        self, step: int, loss: TextLoss, by_source: Mapping[str, TextLoss], of_average: TextLoss | None
    ) -> None:
        """Records and shows the loss on held-out text, also by source if there are several, and of the average of the
        weights if there is one."""
        if self._first:
            several = by_source if len(by_source) > 1 else {}
            values = {"validation_loss": loss.nats, "validation_bits_per_byte": loss.bits_per_byte}
            if of_average is not None:
                values["validation_average_loss"] = of_average.nats
            shown = [METRICS[name].format(value) for name, value in values.items()]
            for name, its in several.items():
                values[f"validation_loss/{name}"] = its.nats
                values[f"validation_bits_per_byte/{name}"] = its.bits_per_byte
                shown.append(f"{name} {its.nats:.4f} ({its.bits_per_byte:.4f})")
            self._tell(step, lambda callback: callback.metrics(step, values))
            self._progress.message(f"step {step}: {', '.join(shown)}")

    def sample(self, step: int, text: str) -> None:
        """Records generated text."""
        if self._first:
            self._tell(step, lambda callback: callback.sample(step, text))

    def saved(self, save: Save) -> None:
        """Records and shows the result of a save."""
        if not self._first:
            return
        if save.error:
            self._progress.message(f"step {save.step}: NOT SAVED: {save.error}")
            self.event(save.step, "save failed", reason=save.error)
            return
        values = {"checkpoint_time_s": save.time_s, "checkpoint_stall_time_s": save.stall_s}
        self._tell(save.step, lambda callback: callback.metrics(save.step, values))
        shown = ", ".join(METRICS[name].format(value) for name, value in values.items())
        self._progress.message(f"step {save.step}: saved {save.path} ({shown})")
        self.event(save.step, "save", checkpoint=str(save.path))

    def event(self, step: int, event: str, **details: Any) -> None:
        """Records an event of the run in `history.jsonl`."""
        if self._first:
            with self._errors_shown(step):
                record_event(self._run_dir, event, step, **details)
            self._tell(step, lambda callback: callback.event(step, event, details))

    def rewind(self, step: int) -> None:
        """Discards the metrics after `step`, to which the run was rolled back."""
        if self._first:
            self._tell(step, lambda callback: callback.rewind(step))

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        if self._first:
            self._progress.message(text)

    def close(self, step: int) -> None:
        """Ends the progress line and flushes the records until `step`."""
        if self._first:
            self._progress.close()
            self._tell(step, lambda callback: callback.close())

    def _endpoint(self, port: int) -> Iterator[Endpoint]:
        try:
            yield Endpoint(port)
        except OSError as error:  # `triplane train` has checked the port; a restart must not fail because of it
            self._progress.message(f"NOT SERVED: training.prometheus_port ({port}): {error.strerror}")

    def _starts(self, callback: Callback, run: Run) -> bool:
        try:
            callback.start(run)
        except Exception as error:  # after a restart nobody may be there to help
            self._progress.message(f"NOT FOLLOWED BY {type(callback).__name__}: {error}")
            return False
        return True

    def _tell(self, step: int, tell: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            with self._errors_shown(step, callback):
                tell(callback)

    @contextmanager
    def _errors_shown(self, step: int, callback: Callback | None = None) -> Iterator[None]:
        """Shows an error instead of raising it: neither a full disk nor a tracker may end training."""
        ours = callback is None or isinstance(callback, MetricsWriter | Endpoint)
        expected: type[Exception] = OSError if ours else Exception
        try:
            yield
        except expected as error:
            by = "" if ours else f" BY {type(callback).__name__}"
            self._progress.message(f"step {step}: NOT RECORDED{by}: {error}")
