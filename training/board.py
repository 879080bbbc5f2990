"""Writes TensorBoard's events: grouped tags, and training and validation as two lines of one chart."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_GROUPS = {
    "1 loss": ("loss", "average_loss", "perplexity"),
    "2 learning": (
        "added_loss",
        "bits_per_byte",
        "dropped_tokens",
        "expert_load",
        "further_loss",
        "gradient_norm",
        "learning_rate",
        "noise_scale",
        "padding",
        "router_entropy",
        "tokens_seen",
    ),
    "3 speed": (
        "data_time_s",
        "forward_backward_time_s",
        "mfu",
        "optimizer_time_s",
        "step_time_s",
        "tokens_per_s",
        "tokens_per_s_per_rank",
    ),
    "4 machine": ("checkpoint_stall_time_s", "checkpoint_time_s", "memory_gib"),
    "5 user": ("user",),
}
"""Metrics by group; TensorBoard sorts groups by name, and opens the first ones."""
_GROUP_OF = {metric: group for group, metrics in _GROUPS.items() for metric in metrics}
_VALIDATION = "validation"
_TRAINING = ""


def tag(name: str) -> str:
    """Returns the tag of a metric. That of validation is the one of training, since its line is in the same chart."""
    metric, _, of = name.partition("/")
    shown = metric.removeprefix(f"{_VALIDATION}_")
    return f"{_GROUP_OF[shown]}/{of if shown == 'user' else f'{shown} {of}'.rstrip()}"


class Board:
    """The events of a run in a folder, and of its validation in one below, from `first_step` on.

    They are flushed at once. Raises OSError if they cannot be written; later ones are written once that is possible.
    """

    def __init__(self, folder: Path, first_step: int):
        self._folder = folder
        self._writers = {name: self._open(name, first_step) for name in (_TRAINING, _VALIDATION)}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values by their names in `METRICS`."""
        for kind in (_TRAINING, _VALIDATION):
            own = [name for name in values if name.startswith(_VALIDATION) == (kind == _VALIDATION)]
            if own:
                with self._writer(kind) as writer:
                    for name in own:
                        writer.add_scalar(tag(name), values[name], step)

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text in Markdown."""
        with self._writer(_TRAINING) as writer:
            writer.add_text(name, text, step)

    def choices(self, run: str, choices: Mapping[str, object]) -> None:
        """Adds the hyperparameters of a run, of which TensorBoard shows the first that it had."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        with self._writer(_TRAINING) as writer:
            # `add_hparams` would create a separate run for them.
            writer._get_file_writer().add_summary(hparams_pb(choices, trial_id=run))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _open(self, kind: str, first_step: int | None = None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        return SummaryWriter(str(self._folder / kind), purge_step=first_step)

    @contextmanager
    def _writer(self, kind: str) -> Iterator["SummaryWriter"]:
        """Yields the writer, then flushes it. A writer that failed is unusable: the next one opens a new file."""
        writer = self._writers.pop(kind, None) or self._open(kind)
        yield writer
        writer.flush()
        self._writers[kind] = writer
