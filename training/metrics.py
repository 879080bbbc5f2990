"""Defines the metrics of a run, and records them in `metrics.jsonl` and TensorBoard."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from triplane.training.board import Board
from triplane.training.callback import Callback, Run
from triplane.training.run_folder import RunFolder
from triplane.training.run_log import cut_log, open_log
from triplane.training.units import format_count


@dataclass(frozen=True)
class Metric:
    """Meaning and format of a value that rank 0 reports."""

    unit: str
    reduction: str
    """The reduction over ranks."""
    format: Callable[[float], str]
    """Formats the value for the console, with name and unit."""


_TOKEN_MEAN = "mean over tokens of the global batches since the last log"
_SAME = "same on all ranks"
_MAX = "max over ranks"

METRICS = {
    "loss": Metric("nats/token", _TOKEN_MEAN, "loss {:.4f}".format),
    "bits_per_byte": Metric("bits/byte", _TOKEN_MEAN, "{:.4f} bits/byte".format),
    "perplexity": Metric("1", _TOKEN_MEAN, "perplexity {:.2f}".format),
    "validation_loss": Metric(
        "nats/token",
        "mean over held-out tokens of the first sources",
        "validation loss {:.4f}".format,
    ),
    "validation_bits_per_byte": Metric(
        "bits/byte", "mean over held-out tokens of the first sources", "{:.4f} bits/byte".format
    ),
    "validation_average_loss": Metric(
        "nats/token", "as `validation_loss`, of the average of the weights", "of the average {:.4f}".format
    ),
    "learning_rate": Metric("1", _SAME, "learning rate {:.2e}".format),
    "gradient_norm": Metric("1", "norm over all parameters, before clipping", "gradient norm {:.3f}".format),
    "noise_scale": Metric(
        "tokens", "of gradients, running average", lambda count: f"noise scale {format_count(count)} tokens"
    ),
    "further_loss": Metric("nats/token", "mean over modules and tokens of the last batch", "further {:.4f}".format),
    "added_loss": Metric("nats/token", "sum over layers, mean over tokens of the last batch", "added {:.4f}".format),
    "expert_load": Metric(
        "1", "tokens of the busiest expert over the mean, max over layers", "busiest expert {:.2f}".format
    ),
    "router_entropy": Metric("nats", "of an expert's score, mean over tokens, min over layers", "router {:.2f}".format),
    "dropped_tokens": Metric("fraction of tokens x active", "max over layers", "dropped {:.3f}".format),
    "tokens_seen": Metric("tokens", _SAME, lambda count: f"{format_count(count)} tokens"),
    "padding": Metric(
        "fraction of positions", "mean over the global batches", lambda fraction: f"{100 * fraction:.1f} % padding"
    ),
    "tokens_per_s": Metric("tokens/s", "sum over ranks", lambda rate: f"{format_count(rate)} tokens/s"),
    "tokens_per_s_per_rank": Metric(
        "tokens/s", "mean over ranks", lambda rate: f"{format_count(rate)} tokens/s per rank"
    ),
    "mfu": Metric("fraction of published peak", "mean over ranks", lambda fraction: f"MFU {100 * fraction:.1f} %"),
    "step_time_s": Metric("s", _MAX, "step {:.3f} s".format),
    "data_time_s": Metric("s", _MAX, "data {:.3f} s".format),
    "forward_backward_time_s": Metric("s", _MAX, "forward and backward {:.3f} s".format),
    "optimizer_time_s": Metric("s", _MAX, "optimizer {:.3f} s".format),
    "checkpoint_stall_time_s": Metric("s", _MAX, "training stalled for {:.3f} s".format),
    "checkpoint_time_s": Metric("s", "until all ranks have written", "{:.3f} s".format),
    "memory_gib": Metric("GiB", "peak so far, max over ranks", "{:.1f} GiB".format),
    "user": Metric("its own", "quotient of sums over data-parallel ranks", "{:.4g}".format),
}


class MetricsWriter(Callback):
    """Appends to metrics.jsonl, samples.jsonl and TensorBoard events in `run_dir/tensorboard`; for rank 0.

    A run that resumes after `resume_step` replaces the records of later steps, so that each curve is one line. Records
    are flushed at once. Raises OSError if one cannot be written; later ones are written once that is possible.
    """

    def __init__(self, run_dir: Path, resume_step: int):
        self._run = RunFolder(run_dir)
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        # A fresh start repeats the validation before the first step, if any.
        first_step = resume_step + 1 if resume_step else 0
        try:
            for log in (self._run.metrics, self._run.samples):
                cut_log(log, first_step)
        finally:  # a full disk, at a rollback, must not leave them closed
            self._lines, self._samples = open_log(self._run.metrics), open_log(self._run.samples)
            self._board = Board(self._run.tensorboard, first_step)
        if resume_step == 0:
            self._board.text(0, "metrics", _legend())

    def start(self, run: Run) -> None:
        self.choices(run.step, run.toml, run.choices)

    def choices(self, step: int, config: str, choices: Mapping[str, object]) -> None:
        """Shows the config as TOML, and its values, numbers or text, as hyperparameters."""
        self._board.text(step, "config", _code_block(config))
        self._board.choices(str(self._run.path), choices)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values`, reduced over ranks, under their names in `METRICS`."""
        names = {name.partition("/")[0] for name in values}  # the source, or the user's name, follows the slash
        assert names <= METRICS.keys(), f"not in METRICS: {names - METRICS.keys()}"
        self._lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._board.scalars(step, values)

    def sample(self, step: int, text: str) -> None:
        """Records generated text, shown in TensorBoard verbatim."""
        self._samples.write(json.dumps({"step": step, "sample": text}) + "\n")
        self._board.text(step, "sample", _code_block(text))

    def rewind(self, step: int) -> None:
        self.close()
        self._open(step)

    def close(self) -> None:
        with ExitStack() as stack:  # closes all, even if one cannot be written
            for each in (self._lines, self._samples, self._board):
                stack.callback(each.close)


def _code_block(text: str) -> str:
    """Indents text as a Markdown code block."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _legend() -> str:
    rows = (f"| {name} | {metric.unit} | {metric.reduction} |" for name, metric in METRICS.items())
    return "\n".join(["| metric | unit | over ranks |", "| --- | --- | --- |", *rows])
