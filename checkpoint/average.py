"""Writes the mean of the weights of a run's last checkpoints, as a checkpoint of its own (Izmailov et al. 2018)."""

from collections.abc import Sequence
from pathlib import Path

from triplane.checkpoint.folder import checkpoints, step_of
from triplane.checkpoint.kept_tokenizer import KeptTokenizer, read_tokenizer, write_tokenizer
from triplane.checkpoint.manifest import Manifest, write_manifest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import MeanWeights, write_weights
from triplane.storage.errors import CheckpointError
from triplane.storage.location import Location
from triplane.storage.publish import publishing, refuse_existing


def last_checkpoints(newest: Location, count: int) -> list[Location]:
    """Returns the last `count` checkpoints of a run up to `newest`, oldest first; raises CheckpointError if there are
    fewer."""
    found = checkpoints(newest.parent)
    found = found[: found.index(newest) + 1] if newest in found else []
    if len(found) < count:
        steps = ", ".join(str(step_of(each)) for each in found) or "none"
        raise CheckpointError(
            f"{newest}: the mean of {count} checkpoints, but the run has {len(found)} until there (step {steps}); take "
            f"fewer, or keep more by checkpoint.keep_last or keep_every"
        )
    return found[-count:]


def write_average(folders: Sequence[Location], out: Path, kept: KeptTokenizer | None) -> list[int]:
    """Writes the checkpoint `out`: mean weights, no moments, and the state and tokenizer of the last one; returns the
    steps that are in the mean.

    Holds one weight of each at a time. Raises CheckpointError, and leaves nothing, if one is damaged or `out` exists.
    """
    refuse_existing(out)
    opened = [Checkpoint(folder) for folder in folders]
    steps = [checkpoint.state["step"] for checkpoint in opened]
    with publishing(out) as temporary:
        boxes, sizes = write_weights(MeanWeights(opened), temporary)
        if kept is not None:
            sizes |= write_tokenizer(read_tokenizer(folders[-1], kept), temporary)
        state = opened[-1].state | {"validation_loss": None, "mean_of": steps}
        write_manifest(temporary, Manifest(state, boxes, sizes))
    return steps
