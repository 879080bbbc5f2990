"""Shows and records a run on rank 0: console, `metrics.jsonl`, TensorBoard, Prometheus, `history.jsonl`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triplane.checkpoint.store import Save
from triplane.training.evaluation import TextLoss
from triplane.training.metrics import METRICS, MetricsWriter
from triplane.training.progress import Progress
from triplane.training.prometheus import Endpoint
from triplane.training.run_log import record_event


class Report:
    """Called by the training loop on every rank, with values that are already reduced over ranks."""

    def __init__(self, run_dir: Path, *, steps: int, resume_step: int, rank: int, prometheus_port: int | None = None):
        self._first = rank == 0
        self._run_dir = run_dir
        self._endpoint: Endpoint | None = None
        if self._first:
            self._writer = MetricsWriter(run_dir, resume_step)
            self._progress = Progress(steps)
            if prometheus_port is not None:
                self._serve(prometheus_port)

    def choices(self, step: int, config: str, choices: Mapping[str, object]) -> None:
        """Records the config that applies from `step` on, as TOML and as values by key."""
        if self._first:
            with self._write_errors_shown(step):
                self._writer.choices(step, config, choices)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records and shows the metrics of a step."""
        if self._first:
            self._log(step, values)
            if self._endpoint is not None:
                self._endpoint.update({"step": step})
            self._progress.update(step, values)

    def validation(self, step: int, loss: TextLoss, by_source: Mapping[str, TextLoss]) -> None:
        """Records and shows the loss on held-out text, also by source if there are several."""
        if self._first:
            several = by_source if len(by_source) > 1 else {}
            values = {"validation_loss": loss.nats, "validation_bits_per_byte": loss.bits_per_byte}
            shown = [METRICS[name].format(value) for name, value in values.items()]
            for name, its in several.items():
                values[f"validation_loss/{name}"] = its.nats
                values[f"validation_bits_per_byte/{name}"] = its.bits_per_byte
                shown.append(f"{name} {its.nats:.4f} ({its.bits_per_byte:.4f})")
            self._log(step, values)
            self._progress.message(f"step {step}: {', '.join(shown)}")

    def sample(self, step: int, text: str) -> None:
        """Records generated text."""
        if self._first:
            with self._write_errors_shown(step):
                self._writer.sample(step, text)

    def saved(self, save: Save) -> None:
        """Records and shows the result of a save."""
        if not self._first:
            return
        if save.error:
            self._progress.message(f"step {save.step}: NOT SAVED: {save.error}")
            self.event(save.step, "save failed", reason=save.error)
            return
        values = {"checkpoint_time_s": save.time_s, "checkpoint_stall_time_s": save.stall_s}
        self._log(save.step, values)
        shown = ", ".join(METRICS[name].format(value) for name, value in values.items())
        self._progress.message(f"step {save.step}: saved {save.path} ({shown})")
        self.event(save.step, "save", checkpoint=str(save.path))

    def event(self, step: int, event: str, **details: Any) -> None:
        """Records an event of the run in `history.jsonl`."""
        if self._first:
            with self._write_errors_shown(step):
                record_event(self._run_dir, event, step, **details)
            if self._endpoint is not None:
                self._endpoint.count(event)

    def rewind(self, step: int) -> None:
        """Discards the metrics after `step`, to which the run was rolled back."""
        if self._first:
            self._writer.close()
            self._writer = MetricsWriter(self._run_dir, step)

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        if self._first:
            self._progress.message(text)

    def close(self, step: int) -> None:
        """Ends the progress line and flushes the records until `step`."""
        if self._first:
            self._progress.close()
            with self._write_errors_shown(step):
                self._writer.close()
            if self._endpoint is not None:
                self._endpoint.close()

    def _serve(self, port: int) -> None:
        try:
            self._endpoint = Endpoint(port)
        except OSError as error:  # `triplane train` has checked the port; a restart must not fail because of it
            self._progress.message(f"NOT SERVED: training.prometheus_port ({port}): {error.strerror}")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        with self._write_errors_shown(step):
            self._writer.log(step, values)
        if self._endpoint is not None:
            self._endpoint.update({name: value for name, value in values.items() if name in METRICS})

    @contextmanager
    def _write_errors_shown(self, step: int) -> Iterator[None]:
        """Shows an OSError instead of raising it: a full disk must not end training."""
        try:
            yield
        except OSError as error:
            self._progress.message(f"step {step}: NOT RECORDED: {error}")
