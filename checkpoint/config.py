"""The config table `[checkpoint]`: when state is saved and which checkpoints are kept."""

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from triplane.storage.foreign import Place


class CheckpointConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Checkpoints are named `step_N`; a save deletes those that no `keep_` key keeps."""

    folder: Place | None = None
    """Their folder: a path, or an fsspec URL such as `s3://bucket/run`. None: `RUN/checkpoints`."""
    every_steps: PositiveInt = 1000
    """Save every this many steps, and after the last."""
    asynchronous: bool = True
    """Write while training continues; takes as much host memory as a rank's state."""
    keep_last: int = Field(default=2, ge=1)
    """Keep this many newest checkpoints."""
    keep_every: PositiveInt | None = None
    """Also keep those at multiples of this many steps."""
    keep_best: NonNegativeInt = 0
    """Also keep this many with the lowest validation loss."""
    initial: Place | None = None
    """A checkpoint, or a run folder with one, whose weights a new run starts from; `triplane import` makes one."""
