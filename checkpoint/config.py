"""The choices that define when state is saved and what is kept."""

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt


class CheckpointConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Checkpoints are named `step_N`; what no `keep_` key names is deleted after a save."""

    folder: str | None = Field(default=None, min_length=1)
    """Where they lie: a path, or an fsspec URL such as `s3://bucket/run`. None: in `RUN/checkpoints`."""
    every_steps: PositiveInt = 1000
    """Save after each this many steps, and after the last."""
    asynchronous: bool = True
    """Write while training goes on; takes as much host memory as the state that a rank holds."""
    keep_last: int = Field(default=2, ge=1)
    """Keep this many newest checkpoints."""
    keep_every: PositiveInt | None = None
    """Keep those after multiples of this many steps too."""
    keep_best: NonNegativeInt = 0
    """Keep this many with the lowest validation loss too."""
    initial: str | None = Field(default=None, min_length=1)
    """A checkpoint, or a run folder with one, whose weights a new run begins with; `triplane import` makes one."""
