"""Computes the disk space that a run's checkpoints need."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from triplane.config.preflight import checkpoints_folder
from triplane.model.describe import model_weights
from triplane.storage.errors import CheckpointError
from triplane.storage.location import entries
from triplane.storage.remote import is_url
from triplane.training.config import RunConfig


def kept_checkpoints(config: RunConfig) -> int:
    """Returns the maximum number of checkpoints at once: those that the rules keep, and one being written."""
    rules, steps = config.checkpoint, config.training.steps
    saves = -(-steps // rules.every_steps)
    kept = rules.keep_last + rules.keep_best + (steps // rules.keep_every if rules.keep_every else 0)
    return min(saves, kept) + 1


def checkpoint_bytes(config: RunConfig) -> int:
    """Returns the size of one checkpoint."""
    weights = model_weights(config.model).values()
    return sum(round(4 * (1 + config.optimizer.kept(weight)) * weight.elements) for weight in weights)


def disk_problems(config: RunConfig) -> Iterator[str]:
    """Yields a problem if the disk has no room for the checkpoints that the rules keep; URLs are not checked."""
    if is_url(config.checkpoint.folder):
        return
    folder = Path(str(checkpoints_folder(config)))
    try:
        existing = sum(max(0, size) for name in entries(folder) for size in entries(folder / name).values())
        disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(disk).free + existing
    except (CheckpointError, OSError):
        return  # unreadable: `write_problem` reports whether it is writable
    one, count = checkpoint_bytes(config), kept_checkpoints(config)
    if one * count > free:
        yield (
            f"{folder}: {count} checkpoints of {one / 2**30:,.1f} GiB (those that checkpoint.keep_last, keep_every and "
            f"keep_best name, and one being written) need {one * count / 2**30:,.1f} GiB, but {free / 2**30:,.1f} GiB "
            f"are free; keep fewer, or set checkpoint.folder to a larger disk"
        )
