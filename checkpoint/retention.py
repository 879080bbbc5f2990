"""Decides which checkpoints a run keeps."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from triplane.checkpoint.config import CheckpointConfig


class Kept(NamedTuple):
    """An existing checkpoint."""

    step: int
    validation_loss: float | None
    """Measured at its step; None without validation."""


def expendable(kept: Iterable[Kept], rules: CheckpointConfig) -> list[int]:
    """Returns the steps of the checkpoints that no rule keeps, oldest first; of equal losses the later is better."""
    found = sorted(kept, key=lambda checkpoint: checkpoint.step)
    steps = [step for step, _ in found]
    wanted = set(steps[-rules.keep_last :])
    if rules.keep_every:
        wanted |= {step for step in steps if step % rules.keep_every == 0}
    losses = [(loss, -step) for step, loss in found if loss is not None and math.isfinite(loss)]
    wanted |= {-step for _, step in sorted(losses)[: rules.keep_best]}
    return [step for step in steps if step not in wanted]
